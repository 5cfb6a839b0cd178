#include "lightning/loops/interrupt.h"

#include <unistd.h>

#include <atomic>
#include <csignal>

#include "lightning/data/loader.h"
#include "lightning/errors.h"

namespace lightning {
namespace {

std::atomic<bool> scope_active{false};
std::atomic<int> interrupts{0};
std::atomic<bool> sigterm{false};
struct sigaction previous_int, previous_term;

// 128 + SIGINT, as a shell reports a program that Ctrl-C ended.
constexpr int kInterruptedStatus = 130;

void on_interrupt(int) {
  if (interrupts.fetch_add(1) > 0) _exit(kInterruptedStatus);
}

void on_terminate(int signal) {
  sigterm = true;
  const auto handler = previous_term.sa_handler;
  if (handler != SIG_DFL && handler != SIG_IGN && (previous_term.sa_flags & SA_SIGINFO) == 0) {
    handler(signal);
  }
}

}  // namespace

SignalScope::SignalScope() : active_(!scope_active.exchange(true)) {
  if (!active_) return;
  interrupts = 0;
  sigterm = false;
  struct sigaction action {};
  sigemptyset(&action.sa_mask);
  action.sa_flags = SA_RESTART;
  action.sa_handler = on_interrupt;
  sigaction(SIGINT, &action, &previous_int);
  action.sa_handler = on_terminate;
  sigaction(SIGTERM, &action, &previous_term);
  set_wait_check(&raise_if_interrupted);  // waiting for a slow data loader ends too
}

SignalScope::~SignalScope() {
  if (!active_) return;
  set_wait_check(nullptr);
  sigaction(SIGINT, &previous_int, nullptr);
  sigaction(SIGTERM, &previous_term, nullptr);
  scope_active = false;
}

bool received_sigterm() { return sigterm; }

void raise_if_interrupted() {
  if (interrupts.load(std::memory_order_relaxed) > 0) throw KeyboardInterrupt();
  if (sigterm.load(std::memory_order_relaxed)) throw SIGTERMException();
}

}  // namespace lightning
