// What the device that would run a kernel can do.
#pragma once

namespace lightning::cuda {

// 80 for Ampere, 90 for Hopper. Asked of the driver once for each device.
int compute_capability(int device);

}  // namespace lightning::cuda
