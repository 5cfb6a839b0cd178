#include "precision/bf16_support.h"

#include <algorithm>

#include "lightning/accelerators/nvidia.h"
#include "lightning/errors.h"

namespace lightning {

void check_bf16(const std::string& precision, const std::string& instead, c10::Device device) {
  if (!device.is_cuda()) return;
  const int index = std::max<int>(device.index(), 0);
  detail::check_bf16(precision, instead, device, nvidia::gpu_name(index),
                     nvidia::compute_capability(index));
}

void detail::check_bf16(const std::string& precision, const std::string& instead,
                        c10::Device device, const std::string& gpu, int capability) {
  constexpr int kAmpere = 80;
  if (capability == 0 || capability >= kAmpere) return;
  throw MisconfigurationError(
      str("precision \"", precision, "\" got ", device, ", a ", gpu, " of compute capability ",
          capability / 10, ".", capability % 10,
          ", which has no bfloat16 arithmetic; that begins with 8.0 (Ampere). Use ", instead, "."));
}

}  // namespace lightning
