// What a rank does with the others just now: the call that all of them must make together, and
// whether it waits in it. Errors and the end by a signal name it.
//
// One thread of a process works with the others; any thread may ask.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include "lightning/scope.h"

namespace lightning {

struct Whereabouts {
  std::string call;       // "Trainer.save_checkpoint"; empty: in none
  std::string waits_for;  // "barrier"; empty: it works
  std::chrono::milliseconds waited{0};

  bool waits() const { return !waits_for.empty(); }
};

// While alive this process is in a call that all ranks must make. Of calls inside one another the
// outermost counts, which is the user's.
Scope in_call(std::string name);
// While alive it waits there for the others. Outside of all calls `what` names one.
Scope waiting_for(std::string what);

Whereabouts whereabouts();

// Completes "rank 1 ...": "has waited in `backward` (gradients) for 12 s".
std::string describe(const Whereabouts& one);

// A rank that waits for others which do not come.
struct Stuck {
  int64_t rank = 0;
  std::string text;  // completes "Rank 0 ..."
};

// Whether a rank waits in vain, after all were asked to end: it has waited for some seconds since,
// and so have all that are not in its call; or those work elsewhere for longer than ranks come one
// after another. A rank that works inside the call, as one that writes a file, is waited for.
std::optional<Stuck> find_stuck(const std::map<int64_t, Whereabouts>& by_rank,
                                std::chrono::milliseconds since_signal);

// A wait for other ranks that took longer than the timeout of collectives.
//   others   what they do, as "rank 1 works"; may be empty
std::string timeout_text(const Whereabouts& own, int64_t rank, int64_t ranks,
                         const std::string& others, const std::string& reason);

}  // namespace lightning
