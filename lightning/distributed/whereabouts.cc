#include "lightning/distributed/whereabouts.h"

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#include "lightning/errors.h"

namespace lightning {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
using std::chrono::seconds;

// Nobody comes: all the others wait for something else.
constexpr milliseconds kPatience = seconds(6);
// Somebody may: another works, and may be late. Batch systems kill half a minute after SIGTERM.
constexpr milliseconds kLongPatience = seconds(20);

struct Own {
  std::mutex mutex;
  std::string call;
  std::string waits_for;
  int64_t calls = 0, waits = 0;  // that are alive
  Clock::time_point since;
};

Own& own() {
  static auto* const one = new Own;  // asked for by a thread that no destructor waits for
  return *one;
}

std::string rounded(milliseconds time) { return str(time.count() / 1000, " s"); }

bool has_waited(const Whereabouts& one, milliseconds limit, milliseconds since_signal) {
  return one.waits() && std::min(one.waited, since_signal) >= limit;
}

}  // namespace

Scope in_call(std::string name) {
  auto& here = own();
  const std::lock_guard<std::mutex> lock(here.mutex);
  if (here.calls++ == 0) here.call = std::move(name);
  return scope_exit([&here] {
    const std::lock_guard<std::mutex> end(here.mutex);
    if (--here.calls == 0) here.call.clear();
  });
}

Scope waiting_for(std::string what) {
  auto& here = own();
  const std::lock_guard<std::mutex> lock(here.mutex);
  if (here.waits++ == 0) {
    here.waits_for = std::move(what);
    here.since = Clock::now();
  }
  return scope_exit([&here] {
    const std::lock_guard<std::mutex> end(here.mutex);
    if (--here.waits == 0) here.waits_for.clear();
  });
}

Whereabouts whereabouts() {
  auto& here = own();
  const std::lock_guard<std::mutex> lock(here.mutex);
  Whereabouts now{here.call, here.waits_for, milliseconds(0)};
  if (!now.waits()) return now;
  if (now.call.empty()) now.call = now.waits_for;
  now.waited = std::chrono::duration_cast<milliseconds>(Clock::now() - here.since);
  return now;
}

std::string describe(const Whereabouts& one) {
  if (one.waits()) {
    const auto what = one.waits_for == one.call ? "" : str(" (", one.waits_for, ")");
    return str("has waited in `", one.call, "`", what, " for ", rounded(one.waited));
  }
  return one.call.empty() ? "works outside of such calls" : str("works in `", one.call, "`");
}

std::optional<Stuck> find_stuck(const std::map<int64_t, Whereabouts>& by_rank,
                                milliseconds since_signal) {
  for (const auto& [rank, own] : by_rank) {
    if (!has_waited(own, kPatience, since_signal)) continue;
    std::vector<std::string> others;
    bool one_works = false, all_wait = true;
    for (const auto& [other_rank, other] : by_rank) {
      if (other.call == own.call) {
        one_works = one_works || !other.waits();
        continue;
      }
      all_wait = all_wait && has_waited(other, kPatience, since_signal);
      others.push_back(str("rank ", other_rank, " is not in it: it ", describe(other)));
    }
    if (others.empty() || one_works) continue;
    if (!all_wait && !has_waited(own, kLongPatience, since_signal)) continue;
    return Stuck{rank, str(describe(own), "; ", join(others),
                           ". All ranks must make the same calls in the same order: make this one "
                           "outside of conditions on the rank.")};
  }
  return std::nullopt;
}

std::string timeout_text(const Whereabouts& own, int64_t rank, int64_t ranks,
                         const std::string& others, const std::string& reason) {
  const auto what = own.waits_for == own.call ? "" : own.waits_for + "; ";
  return str("`", own.call, "` on rank ", rank, " of ", ranks, " waited ", rounded(own.waited),
             " for the other ranks in vain (", what, reason, "). ", others,
             others.empty() ? "" : ". ",
             "All ranks must make the same calls in the same order: make this one outside of "
             "conditions on the rank. Where a rank only takes longer, give the strategy a longer "
             "timeout, as DDPStrategyOptions().timeout(\"00:02:00:00\").");
}

}  // namespace lightning
