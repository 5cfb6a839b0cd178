// What a data set can ask about the thread that loads: which worker it is, and a generator whose
// numbers depend on the seed and on the place in the data only.
#pragma once

#include <ATen/core/Generator.h>

#include <cstdint>

namespace lightning {

struct WorkerInfo {
  int64_t id = 0;           // from 0
  int64_t num_workers = 1;  // 1 also where the caller's thread loads
  uint64_t seed = 0;        // of this pass, plus id
};

// The worker that the calling thread is; null on any other thread.
// Source: torch 2.11, `torch.utils.data.get_worker_info`.
const WorkerInfo* worker_info();

// The generator for random augmentation. While a batch is loaded, on a worker or on the caller's
// thread, it is one of the thread's own that starts anew for each batch, from the loader's seed and
// the batch's number: the same numbers come whatever the number of workers, and again when a run is
// resumed in the middle of an epoch. (A stream's numbers depend on its worker too.) At all other
// times it is LibTorch's default CPU generator.
//
// LibTorch's default generator is shared by all threads, so what workers draw from it comes in no
// fixed order.
at::Generator& worker_generator();

// For loaders: says on this thread, for the life of the scope, where loading stands.
class LoadingScope {
 public:
  explicit LoadingScope(uint64_t batch_seed);
  ~LoadingScope();
  LoadingScope(const LoadingScope&) = delete;
  LoadingScope& operator=(const LoadingScope&) = delete;
};
void set_worker_info(const WorkerInfo* info);  // of the calling thread; kept by address

// Bits of all arguments in each bit of the result.
uint64_t mix_seed(uint64_t seed, uint64_t a, uint64_t b = 0);

}  // namespace lightning
