#include "lightning/distributed/lookout.h"

#include <string.h>

#include <utility>
#include <vector>

#include "lightning/errors.h"

namespace lightning {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

// After a signal, how often rank 0 looks whether one waits in vain.
constexpr seconds kLookAgain{1};
// For answers about the others.
constexpr seconds kAnswer{2};
// Longest name of a call that is passed on.
constexpr size_t kMostCall = 200;

}  // namespace

// ---- Messages -----------------------------------------------------------------------------------

std::string message_of(const Whereabouts& one) {
  std::string body;
  put_text(body, one.call.substr(0, kMostCall));
  put_text(body, one.waits_for.substr(0, kMostCall));
  put_number(body, one.waited.count());
  return body;
}

std::string message_of(const Doings& all) {
  std::string body;
  for (const auto& [rank, one] : all) {
    put_number(body, rank);
    body += message_of(one);
  }
  return body;
}

Whereabouts read_doing(MessageReader& reader) {
  Whereabouts one;
  one.call = reader.text();
  one.waits_for = reader.text();
  one.waited = milliseconds(reader.number());
  return one;
}

Doings read_doings(MessageReader& reader) {
  Doings all;
  while (!reader.at_end()) {
    const auto rank = reader.number();
    all[rank] = read_doing(reader);
  }
  return all;
}

// ---- Rank 0 -------------------------------------------------------------------------------------

void Lookout::on_signal(int64_t rank, int64_t number, Time now) {
  if (number == 0) {
    signals_.erase(rank);
  } else {
    signals_[rank] = number;
  }
  if (signals_.empty()) {
    since_.reset();
    next_.reset();
  } else if (!since_) {
    since_ = now;
    next_ = now + kLookAgain;
  }
}

bool Lookout::due(Time now) {
  if (!next_ || now < *next_) return false;
  next_ = now + kLookAgain;
  return true;
}

bool Lookout::begin() { return !std::exchange(asked_, true); }

std::optional<Doings> Lookout::on_answer(int64_t rank, const Whereabouts& doing, int64_t ranks) {
  answers_[rank] = doing;
  if (static_cast<int64_t>(answers_.size()) < ranks) return std::nullopt;
  asked_ = false;
  return std::exchange(answers_, {});
}

std::optional<StuckAtSignal> Lookout::find_stuck(const Doings& all, Time now) const {
  if (!since_) return std::nullopt;
  const auto stuck =
      lightning::find_stuck(all, std::chrono::duration_cast<milliseconds>(now - *since_));
  if (!stuck) return std::nullopt;
  const auto number = static_cast<int>(signals_.begin()->second);
  return StuckAtSignal{
      stuck->rank,
      str(stuck->text, " The run was asked to end by SIG", ::sigabbrev_np(number), "."), number};
}

// ---- Each rank ----------------------------------------------------------------------------------

void ToldDoings::hear(Doings all) {
  const std::lock_guard<std::mutex> lock(mutex_);
  last_ = std::move(all);
  ++times_;
  heard_.notify_all();
}

std::string ToldDoings::ask_of_others(int64_t own_rank, const std::function<void()>& ask) {
  std::unique_lock<std::mutex> lock(mutex_);
  const auto before = times_;
  lock.unlock();
  ask();
  lock.lock();
  if (!heard_.wait_for(lock, kAnswer, [&] { return times_ > before; })) return "";
  std::vector<std::string> others;
  for (const auto& [rank, one] : last_) {
    if (rank != own_rank) others.push_back(str("rank ", rank, " ", describe(one)));
  }
  return join(others);
}

}  // namespace lightning
