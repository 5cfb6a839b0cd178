// Counts of what a loop has begun and ended; saved in every checkpoint under Python's keys.
// An event is ready, started, processed and completed, in this order, each counted before or after
// the hooks that go with it, so that a restart knows where it was.
// Source: Lightning 2.6, `lightning.pytorch.loops.progress`.
#pragma once

#include <cstdint>

#include "lightning/checkpoint/state.h"

namespace lightning {

struct Tracker {
  int64_t ready = 0;
  int64_t started = 0;
  int64_t processed = 0;
  int64_t completed = 0;

  // After a restart an event that was not completed begins anew.
  void reset_on_restart() { ready = started = processed = completed; }
  void add(int64_t n) {
    ready += n;
    started += n;
    processed += n;
    completed += n;
  }
};

// Which of the four counts an event has; decides its keys in a checkpoint.
enum class TrackerKind { kReadyCompleted, kStarted, kProcessed };

template <TrackerKind kind>
struct Progress {
  Tracker total;
  Tracker current;  // since the epoch or the run began

  void ready() { ++total.ready, ++current.ready; }
  void started() { ++total.started, ++current.started; }
  void processed() { ++total.processed, ++current.processed; }
  void completed() { ++total.completed, ++current.completed; }
  void reset_on_run() { current = Tracker(); }
  void reset_on_restart() { current.reset_on_restart(); }
  void add(int64_t n) { total.add(n), current.add(n); }

  State state_dict() const {
    return State::dict({{"total", save(total)}, {"current", save(current)}});
  }
  void load_state_dict(const State& state) {
    load(state.at("total"), total);
    load(state.at("current"), current);
  }

 private:
  static State save(const Tracker& tracker) {
    auto state = State::dict({{"ready", tracker.ready}, {"completed", tracker.completed}});
    if (kind != TrackerKind::kReadyCompleted) state["started"] = tracker.started;
    if (kind == TrackerKind::kProcessed) state["processed"] = tracker.processed;
    return state;
  }
  static void load(const State& state, Tracker& tracker) {
    tracker.ready = state.at("ready").as_int();
    tracker.completed = state.at("completed").as_int();
    if (kind != TrackerKind::kReadyCompleted) tracker.started = state.at("started").as_int();
    if (kind == TrackerKind::kProcessed) tracker.processed = state.at("processed").as_int();
  }
};

struct BatchProgress : Progress<TrackerKind::kProcessed> {
  bool is_last_batch = false;

  void reset_on_run() {
    Progress::reset_on_run();
    is_last_batch = false;
  }
  State state_dict() const {
    auto state = Progress::state_dict();
    state["is_last_batch"] = is_last_batch;
    return state;
  }
  void load_state_dict(const State& state) {
    Progress::load_state_dict(state);
    if (const auto* last = state.find("is_last_batch")) is_last_batch = last->as_bool();
  }
};

struct OptimizerProgress {
  Progress<TrackerKind::kReadyCompleted> step;
  Progress<TrackerKind::kStarted> zero_grad;

  void reset_on_run() { step.reset_on_run(), zero_grad.reset_on_run(); }
  void reset_on_restart() { step.reset_on_restart(), zero_grad.reset_on_restart(); }
  State state_dict() const {
    return State::dict({{"optimizer", State::dict({{"step", step.state_dict()},
                                                   {"zero_grad", zero_grad.state_dict()}})}});
  }
  void load_state_dict(const State& state) {
    step.load_state_dict(state.at("optimizer").at("step"));
    zero_grad.load_state_dict(state.at("optimizer").at("zero_grad"));
  }
};

}  // namespace lightning
