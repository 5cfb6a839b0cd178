// Rates of a loop over its last updates: batches, samples, items and floating-point operations per
// second. For ThroughputMonitor, and for loops of one's own.
//
//   Throughput throughput;
//   for (...) throughput.update({seconds_since_start, batches_so_far, samples_so_far});
//   for (const auto& [name, value] : throughput.compute()) ...
//
// Source: Lightning 2.6, `Throughput`, `get_available_flops`.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "lightning/options.h"

namespace lightning {

struct ThroughputOptions : Options<ThroughputOptions> {
  OPTION(int64_t, window_size, 100, "Updates over which rates are taken. At least 2.");
  OPTION(std::string, separator, "/", "Between the parts of a key.");
};

class Throughput {
 public:
  // All but flops are totals since the start, of this device.
  struct Update {
    double time;  // seconds
    int64_t batches;
    int64_t samples;                                // at least one in a batch
    std::optional<int64_t> lengths = std::nullopt;  // items, at least one in a sample
    std::optional<int64_t> flops = std::nullopt;    // since the update before
  };

  //   available_flops   what one device could do in a second; 0 where not known
  // Errors: MisconfigurationError for a window below 2.
  explicit Throughput(ThroughputOptions options = {}, double available_flops = 0,
                      int64_t world_size = 1);

  // Errors: MisconfigurationError for a total that does not grow, for fewer samples than batches,
  // fewer items than samples, or lengths that are given at some updates only.
  void update(const Update& update);

  // "time", "batches", "samples", "lengths"; once the window is full "device/batches_per_sec",
  // "device/samples_per_sec", "device/items_per_sec", "device/flops_per_sec", "device/mfu" (of the
  // flops there are), and the same without "device" for all devices where there are several. Empty
  // before the first update.
  std::vector<std::pair<std::string, double>> compute() const;
  void reset();

  const ThroughputOptions& options() const { return options_; }
  std::optional<double> last_time() const;

 private:
  bool full(size_t length) const { return length == static_cast<size_t>(options_.window_size()); }

  ThroughputOptions options_;
  double available_flops_;
  int64_t world_size_;
  std::deque<double> time_;
  std::deque<int64_t> batches_, samples_, lengths_;
  std::deque<double> flops_;  // of all devices
};

// Floating-point operations a second that a device of this name does at most in this dtype, dense,
// by its maker's data sheet; nullopt where it is not known.
//   name   as CUDA gives it, "NVIDIA H200"
//   tf32   whether float32 products may run in TF32
std::optional<double> available_flops(const std::string& name, c10::ScalarType dtype, bool tf32);

}  // namespace lightning
