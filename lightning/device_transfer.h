// Tensors on their way from the host to a GPU, beside what the GPU computes meanwhile.
//
// Copies run on a stream of their own, one for each thread and device, from page-locked memory:
// what lies elsewhere is moved there first. The host waits for nothing, and of the device only what
// the current stream is given after join().
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

namespace lightning {

class DeviceTransfer {
 public:
  //   device   a GPU, with or without its index
  explicit DeviceTransfer(c10::Device device);

  // Begins to copy a tensor of the host, which may be freed at once but not written before the copy
  // is done, when it is page-locked already.
  at::Tensor copy(const at::Tensor& tensor);
  // Makes the current stream wait for all copies so far.
  void join();

 private:
  struct Lane;

  c10::Device device_;
  Lane& lane_;
  bool begun_ = false;
};

}  // namespace lightning
