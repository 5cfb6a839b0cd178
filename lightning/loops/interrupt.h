// Signals. Handlers only set a flag; the loops act at the next batch boundary, where everything is
// in order: Ctrl-C and SIGTERM raise, a batch system's signal saves the run. A second Ctrl-C ends
// the program at once. Of several ranks, one that waits for others in vain never comes to a
// boundary: then all end some seconds after the signal (distributed/watch.h).
#pragma once

#include <functional>
#include <optional>

#include "lightning/distributed/collectives.h"

namespace lightning {

// What a batch system asks of a job that it is about to end.
struct PreemptionSignal {
  int number = 0;
  // Called at a batch boundary on the thread that runs, with what came to any rank since the last
  // call, on all ranks alike: that signal, and SIGTERM, which then raises no more.
  std::function<void(bool requeue, bool terminate)> at_boundary;
};

// Takes over SIGINT and SIGTERM while alive, and gives back what was there. A handler for SIGTERM
// that the program had before is called too; one for the pre-emption's signal stays in its place.
// Only one is active at a time; inner ones do nothing.
class SignalScope {
 public:
  explicit SignalScope(std::optional<PreemptionSignal> preemption = std::nullopt);
  ~SignalScope();
  SignalScope(const SignalScope&) = delete;
  SignalScope& operator=(const SignalScope&) = delete;

 private:
  bool active_;
  bool inner_ = false;  // made inside the active one
};

// At a batch boundary of training, where a checkpoint may be taken: what a pre-emption asks for,
// then as raise_if_interrupted(), on all of `ranks` at the same boundary. Errors: those of
// `at_boundary` too.
void handle_signals(Collectives& ranks);

// Anywhere; while several ranks train nowhere but in handle_signals().
// Errors: KeyboardInterrupt, SIGTERMException.
void raise_if_interrupted();
bool received_sigterm();

}  // namespace lightning
