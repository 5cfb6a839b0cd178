// What recorded steps of an optimizer read on the device, and what they were recorded with. Part of
// fused_step.
#pragma once

#include <ATen/core/Tensor.h>

#include <limits>
#include <memory>
#include <vector>

#include "lightning/optim/fused_state.h"

namespace lightning::fused {

struct RecordedStep {
  struct LearningRate {
    size_t group;
    at::Tensor on_device;  // 0-dim float32
    double uploaded = std::numeric_limits<double>::quiet_NaN();
  };
  std::vector<LearningRate> rates;  // one for each group and device

  bool any = false;
  // As they were at the recording: the options that kernels take by value, and every address.
  std::vector<double> options;
  std::vector<const void*> addresses;
  std::vector<void*> stepped;  // keys of the states that a replay counts in
  bool certain = true;         // whether it counts in just those
  bool differs = false;        // there were recordings with other options or addresses

  // Undefined where upload_options() has not made it.
  at::Tensor rate(size_t group, c10::Device device) const;
  // Notes a recording.
  void add(Kind kind, const Optimizer& optimizer, std::vector<void*> stepped, bool certain);
  // Whether a replay would do what the optimizer says now.
  bool holds(Kind kind, const Optimizer& optimizer) const;

  // Null where upload_options() was not called for the optimizer.
  static std::shared_ptr<RecordedStep> find(const Optimizer& optimizer);
};

}  // namespace lightning::fused
