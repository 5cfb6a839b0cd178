// A copy of a state tree as it is at one moment, for a save that goes on while training changes the
// tensors.
//
// Every storage is copied once, and of it only the part in use: tensors that share memory, and
// views, share it in the copy. The memory is kept for the next copy, since giving fresh pages to a
// process takes longer than filling them. Used by one thread at a time.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "lightning/checkpoint/state.h"

namespace lightning {

class Snapshot {
 public:
  Snapshot();
  ~Snapshot();
  Snapshot(const Snapshot&) = delete;
  Snapshot& operator=(const Snapshot&) = delete;

  // A tree with the same values on the host, valid until the next take() or release().
  //
  // Returns once host tensors are copied. Those of a CUDA device are on their way, to pinned memory
  // on a stream of their own: what the caller's stream runs afterwards waits for them on the
  // device, not on the host, and not even there where the device has room for a copy at once.
  // Nothing may be read before wait().
  // Errors: CheckpointError with the bytes where there is no memory for them.
  State take(const State& state);

  // Returns once everything is there; from any thread.
  void wait();

  // Gives the memory back.
  void release();

  uint64_t bytes() const;  // that the last take() copied

 private:
  class Memory;
  class Plan;
  struct Pending;

  std::shared_ptr<Memory> host_;
  std::vector<at::Tensor> pinned_;
  std::vector<Pending> pending_;
  uint64_t bytes_ = 0;
};

}  // namespace lightning
