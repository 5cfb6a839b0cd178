// A kind of device: how its devices are counted, chosen and watched.
// Source: Lightning 2.6, `Accelerator`.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "lightning/scope.h"

namespace lightning {

// The `devices` flag: "auto", "0,1", a count, -1 for all, or a list of indices.
using DevicesFlag = std::variant<std::string, int64_t, std::vector<int64_t>>;

// What becomes of an operator for which the host waits until the device is done.
enum class OnSync : uint8_t { kNothing, kWarn, kError };

class Accelerator {
 public:
  static constexpr const char* kPartKind = "accelerator";

  virtual ~Accelerator() = default;

  virtual std::string name() const = 0;  // "cpu", "cuda"
  virtual bool is_available() const = 0;
  // Smaller is preferred by `accelerator="auto"`.
  virtual int64_t auto_rank() const = 0;

  // The devices of one process group on this node that a `devices` flag asks for.
  // Errors: MisconfigurationError for devices that do not exist, with those that do.
  virtual std::vector<c10::Device> parse_devices(const DevicesFlag& devices) const = 0;

  virtual void setup_device(c10::Device) {}
  // The model of a device, "NVIDIA H200", by which its peak speed is known; empty for none.
  virtual std::string device_name(c10::Device) const { return ""; }
  // Name and value: memory and utilisation, for DeviceStatsMonitor.
  virtual std::vector<std::pair<std::string, double>> device_stats(c10::Device) const = 0;
  virtual int64_t peak_memory_bytes(c10::Device) const { return 0; }
  virtual void synchronize(c10::Device) const {}
  // While the scope lives, an operator on any thread that makes the host wait warns, or throws
  // c10::Error. Null where there is no device that works beside the host.
  virtual Scope sync_debug_scope(OnSync) const { return nullptr; }
  virtual void teardown() {}
};

}  // namespace lightning
