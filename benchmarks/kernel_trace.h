// What a GPU runs, kernel by kernel, as LibTorch's profiler sees it; and how much of the time of
// collectives other kernels hide.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace benchmark {

struct Kernel {
  std::string name;
  int64_t begin_ns = 0, end_ns = 0;
};

// Begins on the thread that ends it, with what runs on this process's device from now on. On the
// CPU operators stand for kernels, so that a machine without a GPU runs all of it.
void start_trace(c10::Device device);
// Waits for the device.
std::vector<Kernel> stop_trace(c10::Device device);

// NCCL's kernels; on the CPU operators that start a collective.
bool is_collective(const std::string& kernel);

struct Overlap {
  double collectives_ms = 0;  // in which at least one collective ran
  double hidden_ms = 0;       // of these, in which another kernel ran too
  double span_ms = 0;         // from the first kernel's begin to the last one's end
  double idle_ms = 0;         // of this, in which none ran

  double share() const { return collectives_ms > 0 ? hidden_ms / collectives_ms : 0; }
};
// nullopt where no kernel ran.
std::optional<Overlap> overlap_of(const std::vector<Kernel>& kernels);

}  // namespace benchmark
