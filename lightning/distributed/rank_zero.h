// Work that one process does before the others.
#pragma once

#include <utility>

#include "lightning/distributed/collectives.h"
#include "lightning/distributed/whereabouts.h"

namespace lightning {

// Calls `work` on rank 0, and on the others once it is done there; all go on together. It may take
// as long as it wants: the others wait without a limit of time.
// Source: Lightning 2.6, `Fabric.rank_zero_first`.
template <class Work>
void rank_zero_first(Collectives& processes, Work&& work) {
  const Scope call = in_call("rank_zero_first");
  if (!processes.is_global_zero()) processes.wait_for_all("rank_zero_first");
  std::forward<Work>(work)();
  if (processes.is_global_zero()) processes.wait_for_all("rank_zero_first");
  processes.wait_for_all("rank_zero_first, the others");
}

}  // namespace lightning
