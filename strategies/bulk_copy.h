// Copies many tensors of the host to where they shall be, all at once: a checkpoint to the shards.
//
// Several threads take pieces of 4 MiB. To a GPU each thread copies through pinned memory for one
// piece, on a stream of its own: one reads pages of a mapped file while another's piece is on its
// way, and the host needs no more memory than that, whatever the tensors have. One thread alone
// that copies ordinary memory to an H200 gives it 9 GB/s, eight of these 35.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

namespace lightning {

class BulkCopy {
 public:
  // What to.copy_(from) does, once run() is called. Copies to the same memory are done in the order
  // in which they were added.
  void add(at::Tensor to, at::Tensor from);

  // Returns once all is there.
  // Errors: those of copy_(); CheckpointError of MappedFile for a file that was cut short.
  void run();

 private:
  struct Copy {
    at::Tensor to, from;
  };
  std::vector<Copy> copies_;
  std::map<uintptr_t, uintptr_t> targets_;  // begins and ends of what they write
};

}  // namespace lightning
