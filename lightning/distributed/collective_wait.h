// The one way in which a collective is waited for: others see where this rank waits, and an error
// of time names the call in which it did.
#pragma once

#include <exception>
#include <stdexcept>
#include <string>
#include <utility>

#include "lightning/distributed/whereabouts.h"

namespace lightning {

// The others did not come within the strategy's timeout.
class CollectiveTimeout : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Errors: CollectiveTimeout where `error` is one of the backend's that tells so.
void explain_timeout(const std::exception& error);

// Calls `wait`, which waits for the other ranks.
//   what   is waited for: "barrier"
template <class Wait>
void wait_together(std::string what, Wait&& wait) {
  const Scope waits = waiting_for(std::move(what));
  try {
    std::forward<Wait>(wait)();
  } catch (const std::exception& error) {
    explain_timeout(error);
    throw;
  }
}

}  // namespace lightning
