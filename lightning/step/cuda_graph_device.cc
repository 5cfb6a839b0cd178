// Only in builds with CUDA.
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/cuda/CUDAEvent.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <exception>
#include <functional>
#include <memory>
#include <utility>

#include "lightning/scope.h"
#include "lightning/step/graph_device.h"

namespace lightning {
namespace {

namespace allocator = c10::cuda::CUDACachingAllocator;

// The memory that graphs share. A new one once no graph holds it: the allocator does not take a
// pool up again that nobody held.
struct Pool {
  const at::cuda::MempoolId_t id = at::cuda::graph_pool_handle();
};

class RecordedCUDAWork : public RecordedWork, private at::cuda::CUDAGraph {
 public:
  // On the current stream, which is not the default one.
  RecordedCUDAWork(std::shared_ptr<Pool> pool, const std::function<void()>& work)
      : pool_(std::move(pool)) {
    try {
      // Other threads may go on to allocate and to ask for events: those that load data do.
      capture_begin(pool_->id, cudaStreamCaptureModeThreadLocal);
      work();
      capture_end();
    } catch (...) {
      abandon();
      throw;
    }
    draws_ = std::any_of(captured_generator_states_.begin(), captured_generator_states_.end(),
                         [](const auto& generator) { return generator.second > 0; });
  }

  void launch() override {
    // replay() also writes the generator's state to the device, by two more launches.
    if (draws_) return replay();
    C10_CUDA_CHECK(cudaGraphLaunch(graph_exec_, at::cuda::getCurrentCUDAStream(capture_dev_)));
  }

 private:
  // LibTorch leaves its allocators and generators recording when a capture fails.
  void abandon() noexcept {
    if (capture_ended_) return;
    cudaGraph_t broken = nullptr;
    cudaStreamEndCapture(capture_stream_, &broken);
    if (broken != nullptr) cudaGraphDestroy(broken);
    cudaGetLastError();  // the failure is known; nobody else shall see it
    for (const auto& generator : captured_generator_states_) {
      generator.first->capturing_ = false;
      generator.first->offset_intragraph_ = 0;
    }
    auto* const host = at::getHostAllocator(at::kCUDA);
    attempt([&] { allocator::endAllocateToPool(capture_dev_, mempool_id_); });
    attempt([&] { allocator::releasePool(capture_dev_, mempool_id_); });
    attempt([&] { host->end_allocate_to_pool(mempool_id_); });
    attempt([&] { host->release_pool(mempool_id_); });
  }

  // What had not begun, or has ended, cannot be ended.
  template <class F>
  static void attempt(const F& f) noexcept {
    try {
      f();
    } catch (const std::exception&) {
    }
  }

  std::shared_ptr<Pool> pool_;
  bool draws_ = false;  // random numbers
};

class CUDAGraphDevice : public GraphDevice {
 public:
  explicit CUDAGraphDevice(c10::Device device)
      : stream_(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device.index())) {}

  void warm_up(const std::function<void()>& work) override {
    const auto current = c10::cuda::getCurrentCUDAStream(stream_.device_index());
    wait(stream_, current);
    const Scope after = scope_exit([&] { wait(current, stream_); });
    const c10::cuda::CUDAStreamGuard on_side(stream_);
    work();
  }

  std::unique_ptr<RecordedWork> record(const std::function<void()>& work) override {
    const c10::cuda::CUDAGuard on_device(stream_.device_index());
    c10::cuda::device_synchronize();
    allocator::emptyCache();  // while a graph is recorded, nothing can be taken from the cache
    auto pool = pool_.lock();
    if (pool == nullptr) pool_ = pool = std::make_shared<Pool>();
    const c10::cuda::CUDAStreamGuard on_side(stream_);
    return std::make_unique<RecordedCUDAWork>(std::move(pool), work);
  }

 private:
  void wait(const c10::cuda::CUDAStream& waiting, const c10::cuda::CUDAStream& for_this) {
    event_.record(for_this);
    event_.block(waiting);
  }

  c10::cuda::CUDAStream stream_;
  at::cuda::CUDAEvent event_;
  std::weak_ptr<Pool> pool_;
};

const bool kKnown = [] {
  cuda_graph_device() = [](c10::Device device) -> std::unique_ptr<GraphDevice> {
    if (!device.is_cuda()) return nullptr;
    return std::make_unique<CUDAGraphDevice>(device);
  };
  return true;
}();

}  // namespace
}  // namespace lightning
