// A target as the class that it must be.
#pragma once

#include <cstdint>

// What assert() calls, which NDEBUG hides.
extern "C" __host__ __device__ void __assert_fail(const char* assertion, const char* file,
                                                  unsigned line, const char* function) noexcept;

namespace lightning::cuda {

// The target, or a device-side assertion for one outside [0, classes).
__device__ inline int class_of(int64_t target, int64_t classes) {
  if (target < 0 || target >= classes) {
    __assert_fail("a target is a class, from 0 to the number of logits, or ignore_index", __FILE__,
                  __LINE__, "cross_entropy");
  }
  return static_cast<int>(target);
}

}  // namespace lightning::cuda
