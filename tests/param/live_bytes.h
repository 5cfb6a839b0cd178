// How many bytes of host memory LibTorch holds: its allocator, counted.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <unordered_map>

namespace lightning {

class LiveBytes : public c10::Allocator {
 public:
  // Counts what is allocated from the first call on, in the whole program.
  static int64_t now() { return instance().live_; }
  // The most there were since the last call.
  static int64_t take_peak() {
    auto& all = instance();
    return std::exchange(all.peak_, all.live_);
  }

  c10::DataPtr allocate(size_t bytes) override {
    constexpr size_t kAlign = 64;
    void* const block = std::aligned_alloc(kAlign, (bytes / kAlign + 1) * kAlign);
    const std::lock_guard<std::mutex> lock(mutex_);
    sizes_[block] = static_cast<int64_t>(bytes);
    live_ += static_cast<int64_t>(bytes);
    peak_ = std::max(peak_, live_);
    return {block, block, &LiveBytes::free, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &LiveBytes::free; }
  void copy_data(void* to, const void* from, std::size_t count) const override {
    default_copy_data(to, from, count);
  }

 private:
  static LiveBytes& instance() {
    static auto* const instance = [] {
      auto* const made = new LiveBytes;  // outlives every tensor
      c10::SetCPUAllocator(made, /*priority=*/255);
      return made;
    }();
    return *instance;
  }
  static void free(void* block) {
    auto& all = instance();
    const std::lock_guard<std::mutex> lock(all.mutex_);
    const auto found = all.sizes_.find(block);
    all.live_ -= found->second;
    all.sizes_.erase(found);
    std::free(block);
  }

  std::mutex mutex_;
  std::unordered_map<void*, int64_t> sizes_;
  int64_t live_ = 0, peak_ = 0;
};

}  // namespace lightning
