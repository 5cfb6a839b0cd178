#include "strategies/side_stream.h"

#include <c10/core/StreamGuard.h>

namespace lightning {
namespace {

c10::Event marked(const c10::Stream& stream) {
  c10::Event event(stream.device_type());
  event.record(stream);
  return event;
}

}  // namespace

SideStream::SideStream(c10::Device device)
    : device_(device), impl_(device.type()), stream_(impl_.getStreamFromGlobalPool(device)) {}

Scope SideStream::use() const { return make_scope<c10::StreamGuard>(stream_); }

c10::Event SideStream::mark() const { return marked(stream_); }

c10::Event SideStream::mark_current() const { return marked(impl_.getStream(device_)); }

void SideStream::wait_for(const c10::Event& event) const { event.block(stream_); }

void SideStream::current_waits_for(const c10::Event& event) const {
  event.block(impl_.getStream(device_));
}

}  // namespace lightning
