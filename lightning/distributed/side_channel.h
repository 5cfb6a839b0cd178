// Texts that the threads of a run's processes hand to one another beside its collectives: they may
// come from any thread at any time, so that work in the background stays out of training's order.
//
// They travel through the store at which the processes met, over a connection of their own. A
// process that waits here waits as long as it takes; one that dies ends all (watch.h).
#pragma once

#include <c10/util/intrusive_ptr.h>

#include <cstdint>
#include <string>
#include <vector>

namespace c10d {
class Store;
}  // namespace c10d

namespace lightning {

class SideChannel {
 public:
  // For a process that is alone.
  SideChannel();
  SideChannel(c10::intrusive_ptr<c10d::Store> store, int64_t rank, int64_t ranks);
  SideChannel(const SideChannel&);
  SideChannel(SideChannel&&) noexcept;
  SideChannel& operator=(const SideChannel&);
  SideChannel& operator=(SideChannel&&) noexcept;
  ~SideChannel();

  int64_t rank() const { return rank_; }

  // What all ranks hand in under a name that was not used before: on rank 0, by rank. The others go
  // on at once, with nothing.
  // Errors of all members: std::runtime_error where the store is gone.
  std::vector<std::string> gather(const std::string& name, const std::string& text);
  // Rank 0's text, on all. Rank 0, in whose process the store may be, waits until all have it.
  std::string broadcast(const std::string& name, const std::string& text);

 private:
  void wait_for(const std::vector<std::string>& keys);
  std::string take(const std::string& key);

  c10::intrusive_ptr<c10d::Store> store_;  // null: this process is alone
  int64_t rank_ = 0, ranks_ = 1;
};

}  // namespace lightning
