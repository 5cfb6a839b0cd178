// What NVIDIA's driver and its management library tell of a GPU. Both are looked for while the
// program runs, so that this builds and links without them; no context is made on a device.
//
//   index   of the device as CUDA counts it (CUDA_VISIBLE_DEVICES applies)
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace lightning::nvidia {

// "NVIDIA H200"; empty where LibTorch has not loaded a driver, as without a GPU.
std::string gpu_name(int index);

// 90 for Hopper, 75 for Turing; 0 where there is no driver.
int compute_capability(int index);

// Name and value of what NVML knows now:
//   gpu_utilization_percent      time in which a kernel ran, in a driver's window below a second
//   memory_utilization_percent   the same for reads and writes of its memory
//   temperature_celsius, power_watts
// Figures that this card, or a part of one (MIG), does not have are left out; all of them where
// there is no NVML. Takes about a millisecond.
std::vector<std::pair<std::string, double>> gpu_use(int index);

}  // namespace lightning::nvidia
