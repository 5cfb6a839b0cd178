#include "lightning/cuda/launch.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include "lightning/cuda/device.h"

namespace lightning::cuda {

bool can_run(const at::Tensor& tensor) {
  if constexpr (kBuilt) {
    return tensor.is_cuda() && compute_capability(tensor.get_device()) >= 80;
  }
  return false;
}

Stream stream_of(const at::Tensor& tensor) {
  const c10::impl::VirtualGuardImpl device(c10::kCUDA);
  return static_cast<Stream>(device.getStream(tensor.device()).native_handle());
}

Dtype dtype_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return Dtype::kFloat;
    case at::kHalf:
      return Dtype::kHalf;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    default:
      TORCH_CHECK(false, "A kernel got a tensor of ", dtype,
                  ", expected float32, float16 or bfloat16.");
  }
}

}  // namespace lightning::cuda
