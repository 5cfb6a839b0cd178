#include "lightning/device_transfer.h"

#include <ATen/ops/empty_like.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <map>
#include <utility>

namespace lightning {

struct DeviceTransfer::Lane {
  explicit Lane(c10::Device device)
      : impl(device.type()), stream(impl.getStreamFromGlobalPool(device)), copied(device.type()) {}

  static Lane& of(c10::Device device) {
    thread_local std::map<std::pair<c10::DeviceType, c10::DeviceIndex>, Lane> lanes;
    return lanes.try_emplace({device.type(), device.index()}, device).first->second;
  }

  c10::impl::VirtualGuardImpl impl;
  c10::Stream stream;
  c10::Event copied;
};

namespace {

c10::Device with_index(c10::Device device) {
  return device.has_index() ? device : c10::impl::VirtualGuardImpl(device.type()).getDevice();
}

// Whether the tensor is bytes that can be copied as they are, and nothing more.
bool is_plain(const at::Tensor& tensor) {
  return tensor.layout() == at::kStrided && !tensor.is_quantized() && !tensor.is_conj() &&
         !tensor.is_neg() && !tensor.requires_grad();
}

}  // namespace

DeviceTransfer::DeviceTransfer(c10::Device device)
    : device_(with_index(device)), lane_(Lane::of(device_)) {}

at::Tensor DeviceTransfer::copy(const at::Tensor& tensor) {
  if (!is_plain(tensor)) return tensor.to(device_, /*non_blocking=*/true);
  const auto dense =
      tensor.is_non_overlapping_and_dense() ? tensor : tensor.clone(at::MemoryFormat::Preserve);
  const auto pinned = dense.is_pinned() ? dense : dense.pin_memory();
  const auto current = lane_.impl.getStream(device_);
  const c10::StreamGuard on_lane(lane_.stream);
  const auto copy = at::empty_like(pinned, pinned.options().device(device_).pinned_memory(false));
  copy.copy_(pinned, /*non_blocking=*/true);
  if (copy.has_storage() && copy.numel() > 0) {
    lane_.impl.recordDataPtrOnStream(copy.storage().data_ptr(), current);
  }
  begun_ = true;
  return copy;
}

void DeviceTransfer::join() {
  if (!begun_) return;
  lane_.copied.record(lane_.stream);
  lane_.copied.block(lane_.impl.getStream(device_));
  begun_ = false;
}

}  // namespace lightning
