#include "lightning/distributed/collective_wait.h"

#include <c10/util/Exception.h>

#include "lightning/distributed/watch.h"

namespace lightning {

void explain_timeout(const std::exception& error) {
  const auto* const of_torch = dynamic_cast<const c10::Error*>(&error);
  std::string text = of_torch != nullptr ? of_torch->what_without_backtrace() : error.what();
  const auto found = text.find("Timed out waiting ");  // Gloo's
  auto* const watch = Watch::current();
  if (found == std::string::npos || watch == nullptr) return;
  if (dynamic_cast<const CollectiveTimeout*>(&error) != nullptr) return;
  text = text.substr(found, text.find('\n', found) - found);
  const auto own = whereabouts();
  throw CollectiveTimeout(timeout_text(own, watch->place().global_rank, watch->place().world_size,
                                       watch->where_others_are(), text));
}

}  // namespace lightning
