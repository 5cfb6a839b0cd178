#include "lightning/loops/interrupt.h"

#include <unistd.h>

#include <atomic>
#include <csignal>
#include <thread>
#include <utility>

#include "lightning/data/loader.h"
#include "lightning/distributed/watch.h"
#include "lightning/distributed/whereabouts.h"
#include "lightning/errors.h"

namespace lightning {
namespace {

std::atomic<bool> scope_active{false};
std::atomic<int> interrupts{0};
std::atomic<bool> sigterm{false};
std::atomic<bool> preempted{false};
// SIGTERM is told to `preemption` rather than raised.
std::atomic<bool> bypasses_sigterm{false};
struct sigaction previous_int, previous_term, previous_preemption;

// Of the active scope, and its thread's; `inner_scopes` are those made inside it.
std::optional<PreemptionSignal> preemption;
bool takes_preemption = false;
std::atomic<std::thread::id> owner;
int inner_scopes = 0;

// 128 + SIGINT, as a shell reports a program that Ctrl-C ended.
constexpr int kInterruptedStatus = 130;

void on_interrupt(int signal) {
  if (interrupts.fetch_add(1) > 0) _exit(kInterruptedStatus);
  Watch::on_stop_signal(signal);
}

void on_terminate(int signal) {
  sigterm = true;
  if (!bypasses_sigterm) Watch::on_stop_signal(signal);
  const auto handler = previous_term.sa_handler;
  if (handler != SIG_DFL && handler != SIG_IGN && (previous_term.sa_flags & SA_SIGINFO) == 0) {
    handler(signal);
  }
}

void on_preemption(int) { preempted = true; }

void take(int signal, void (*handler)(int), struct sigaction* previous) {
  struct sigaction action {};
  sigemptyset(&action.sa_mask);
  action.sa_flags = SA_RESTART;
  action.sa_handler = handler;
  sigaction(signal, &action, previous);
}

}  // namespace

SignalScope::SignalScope(std::optional<PreemptionSignal> asked)
    : active_(!scope_active.exchange(true)) {
  if (!active_) {
    inner_ = std::this_thread::get_id() == owner.load();
    inner_scopes += inner_ ? 1 : 0;
    return;
  }
  interrupts = 0;
  sigterm = false;
  preempted = false;
  owner = std::this_thread::get_id();
  preemption = std::move(asked);
  bypasses_sigterm = preemption.has_value();
  take(SIGINT, on_interrupt, &previous_int);
  take(SIGTERM, on_terminate, &previous_term);
  takes_preemption = false;
  if (preemption) {
    sigaction(preemption->number, nullptr, &previous_preemption);
    takes_preemption = (previous_preemption.sa_flags & SA_SIGINFO) == 0 &&
                       previous_preemption.sa_handler == SIG_DFL;
    if (takes_preemption) take(preemption->number, on_preemption, nullptr);
  }
  set_wait_check(&raise_if_interrupted);  // waiting for a slow data loader ends too
}

SignalScope::~SignalScope() {
  if (!active_) {
    inner_scopes -= inner_ ? 1 : 0;
    return;
  }
  set_wait_check(nullptr);
  sigaction(SIGINT, &previous_int, nullptr);
  sigaction(SIGTERM, &previous_term, nullptr);
  Watch::on_stop_signal(0);
  if (takes_preemption) sigaction(preemption->number, &previous_preemption, nullptr);
  preemption.reset();
  bypasses_sigterm = false;
  owner = std::thread::id();
  scope_active = false;
}

bool received_sigterm() { return sigterm; }

void handle_signals(Collectives& ranks) {
  // A run inside a run, or beside it, is not what the batch system speaks of.
  const bool bypasses =
      bypasses_sigterm && std::this_thread::get_id() == owner.load() && inner_scopes == 0;
  const bool terminates = bypasses || !bypasses_sigterm;
  const bool came = interrupts > 0 || (terminates && sigterm) || (bypasses && preempted);
  if (!meet_here(ranks, Matter::kSignals, came)) return;
  const Scope call = in_call("the look for signals between batches");
  const bool terminate =
      ranks.reduce_any(bypasses ? sigterm.exchange(false) : terminates && sigterm);
  if (bypasses) {
    const bool requeue = ranks.reduce_any(preempted.exchange(false));
    if (requeue || terminate) preemption->at_boundary(requeue, terminate);
  }
  if (ranks.world_size() == 1) return raise_if_interrupted();
  if (ranks.reduce_any(interrupts > 0)) throw KeyboardInterrupt();
  if (terminate && !bypasses) throw SIGTERMException();
}

void raise_if_interrupted() {
  if (const auto* watch = Watch::current(); watch != nullptr && watch->trains()) return;
  if (interrupts.load(std::memory_order_relaxed) > 0) throw KeyboardInterrupt();
  if (sigterm.load(std::memory_order_relaxed) && !bypasses_sigterm) throw SIGTERMException();
}

}  // namespace lightning
