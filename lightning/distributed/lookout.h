// Who waits for whom. Rank 0 asks all ranks what they do, each second from a signal on that asks
// the run to end, and finds one that waits for others in vain; or once, where a rank wants to know.
//
// These classes keep what was asked and answered; a Watch (watch.h) carries the messages.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>

#include "lightning/distributed/message_bytes.h"
#include "lightning/distributed/whereabouts.h"

namespace lightning {

// What ranks do, by rank.
using Doings = std::map<int64_t, Whereabouts>;

std::string message_of(const Whereabouts& one);
std::string message_of(const Doings& all);
Whereabouts read_doing(MessageReader& reader);
Doings read_doings(MessageReader& reader);

// A rank that waits in vain, in a run that a signal asked to end.
struct StuckAtSignal {
  int64_t rank = 0;
  std::string text;  // completes "Rank 0 ...", and names the signal
  int signal = 0;
};

// Rank 0's, of one thread.
class Lookout {
 public:
  using Time = std::chrono::steady_clock::time_point;

  // A rank was asked to end by signal `number`; 0: no more.
  void on_signal(int64_t rank, int64_t number, Time now);
  // When due() is true next; never while no rank was asked to end.
  std::optional<Time> next() const { return next_; }
  // Whether it is time to ask. Says so once a second.
  bool due(Time now);

  // Before all are asked. False where they have been, and not all have answered.
  bool begin();
  // What all of `ranks` do, with the last one's answer.
  std::optional<Doings> on_answer(int64_t rank, const Whereabouts& doing, int64_t ranks);
  // Of such answers; none where no rank was asked to end.
  std::optional<StuckAtSignal> find_stuck(const Doings& all, Time now) const;

 private:
  std::map<int64_t, int64_t> signals_;  // by rank
  std::optional<Time> since_, next_;    // the first of them; the next time to ask
  bool asked_ = false;                  // and not answered by all
  Doings answers_;
};

// Each rank's: what rank 0 has told of all. For any thread.
class ToldDoings {
 public:
  void hear(Doings all);
  // Of the others than `own_rank`: "rank 1 has waited in `backward` for 3 s"; empty where nothing
  // is heard within two seconds.
  //   ask   has rank 0 ask all
  std::string ask_of_others(int64_t own_rank, const std::function<void()>& ask);

 private:
  std::mutex mutex_;
  std::condition_variable heard_;
  int64_t times_ = 0;
  Doings last_;
};

}  // namespace lightning
