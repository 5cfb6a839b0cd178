// A device that records work and replays it: what a GraphExecutor needs of CUDA graphs.
#pragma once

#include <c10/core/Device.h>

#include <functional>
#include <memory>

namespace lightning {

// Work that was recorded. Its memory is its own until it ends.
class RecordedWork {
 public:
  virtual ~RecordedWork() = default;
  // Gives the work to the device, behind all that the current stream holds. Waits for nothing.
  virtual void launch() = 0;
};

// Used on the loop's thread.
class GraphDevice {
 public:
  virtual ~GraphDevice() = default;

  // Runs work that is to be recorded later, as recording wants it done before: on the stream that
  // will record. The current stream and that one wait for each other.
  virtual void warm_up(const std::function<void()>& work) = 0;

  // Calls `work` and keeps what it would have the device do, which is not done before launch().
  // Errors: whatever `work` throws, and c10::Error for work that cannot be recorded; the device,
  // its allocator and its generators are then as before.
  virtual std::unique_ptr<RecordedWork> record(const std::function<void()>& work) = 0;
};

using GraphDeviceFactory = std::function<std::unique_ptr<GraphDevice>(c10::Device)>;

// Makes the one for CUDA; null in a build without CUDA.
GraphDeviceFactory& cuda_graph_device();

}  // namespace lightning
