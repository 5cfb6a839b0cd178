// Ctrl-C and SIGTERM. Handlers only set a flag; the loops raise at the next batch boundary, where
// everything is in order. A second Ctrl-C ends the program at once.
#pragma once

namespace lightning {

// Takes over SIGINT and SIGTERM while alive, and gives back what was there. A handler for SIGTERM
// that the program had before is called too. Only one is active at a time; inner ones do nothing.
class SignalScope {
 public:
  SignalScope();
  ~SignalScope();
  SignalScope(const SignalScope&) = delete;
  SignalScope& operator=(const SignalScope&) = delete;

 private:
  bool active_;
};

// Errors: KeyboardInterrupt, SIGTERMException.
void raise_if_interrupted();
bool received_sigterm();

}  // namespace lightning
