// A stream of a GPU beside its current one, for copies from and to the host that run while the GPU
// computes. Only the parts of LibTorch that a build without CUDA has too are called.
//
// Memory belongs to the stream that was current when it was allocated: what another stream reads or
// writes must be kept until the first has waited for it.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "lightning/scope.h"

namespace lightning {

class SideStream {
 public:
  //   device   a GPU
  explicit SideStream(c10::Device device);

  // While alive it is the thread's current stream.
  Scope use() const;
  // Of what was launched on it so far.
  c10::Event mark() const;
  // Of what was launched on the thread's current stream so far.
  c10::Event mark_current() const;
  // What is launched on it from now on comes after the event; the host goes on.
  void wait_for(const c10::Event& event) const;
  // Likewise for the thread's current stream.
  void current_waits_for(const c10::Event& event) const;

 private:
  c10::Device device_;
  c10::impl::VirtualGuardImpl impl_;
  c10::Stream stream_;
};

}  // namespace lightning
