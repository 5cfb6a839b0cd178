#include "benchmarks/kernel_trace.h"

#include <kineto/ActivityType.h>
#include <torch/csrc/autograd/profiler_kineto.h>
#include <torch/cuda.h>

#include <algorithm>
#include <set>
#include <utility>

namespace benchmark {
namespace {

namespace profiler = torch::autograd::profiler;
using torch::profiler::impl::ActivityType;

using Interval = std::pair<int64_t, int64_t>;

// In their order, without overlaps among themselves.
std::vector<Interval> merged(std::vector<Interval> intervals) {
  std::sort(intervals.begin(), intervals.end());
  std::vector<Interval> result;
  for (const auto& one : intervals) {
    if (one.first >= one.second) continue;
    if (result.empty() || one.first > result.back().second) {
      result.push_back(one);
    } else {
      result.back().second = std::max(result.back().second, one.second);
    }
  }
  return result;
}

int64_t length(const std::vector<Interval>& intervals) {
  int64_t sum = 0;
  for (const auto& [begin, end] : intervals) sum += end - begin;
  return sum;
}

// Of merged ones.
int64_t common_length(const std::vector<Interval>& a, const std::vector<Interval>& b) {
  int64_t sum = 0;
  for (size_t i = 0, j = 0; i < a.size() && j < b.size();) {
    const auto begin = std::max(a[i].first, b[j].first);
    const auto end = std::min(a[i].second, b[j].second);
    sum += std::max<int64_t>(end - begin, 0);
    ++(a[i].second < b[j].second ? i : j);
  }
  return sum;
}

std::set<ActivityType> activities(c10::Device device) {
  return {device.is_cuda() ? ActivityType::CUDA : ActivityType::CPU};
}

}  // namespace

void start_trace(c10::Device device) {
  if (device.is_cuda()) torch::cuda::synchronize(device.index());
  const profiler::ProfilerConfig config(profiler::ProfilerState::KINETO);
  profiler::prepareProfiler(config, activities(device));
  profiler::enableProfiler(config, activities(device));
}

std::vector<Kernel> stop_trace(c10::Device device) {
  if (device.is_cuda()) torch::cuda::synchronize(device.index());
  const auto wanted =
      static_cast<uint8_t>(device.is_cuda() ? libkineto::ActivityType::CONCURRENT_KERNEL
                                            : libkineto::ActivityType::CPU_OP);
  const auto result = profiler::disableProfiler();
  std::vector<Kernel> kernels;
  for (const auto& event : result->events()) {
    if (event.deviceType() != device.type() || event.activityType() != wanted) continue;
    kernels.push_back(
        {event.name(), static_cast<int64_t>(event.startNs()), static_cast<int64_t>(event.endNs())});
  }
  return kernels;
}

bool is_collective(const std::string& kernel) {
  return kernel.find("nccl") != std::string::npos || kernel.rfind("c10d::", 0) == 0;
}

std::optional<Overlap> overlap_of(const std::vector<Kernel>& kernels) {
  std::vector<Interval> collectives, others, all;
  for (const auto& kernel : kernels) {
    (is_collective(kernel.name) ? collectives : others)
        .emplace_back(kernel.begin_ns, kernel.end_ns);
    all.emplace_back(kernel.begin_ns, kernel.end_ns);
  }
  collectives = merged(std::move(collectives));
  all = merged(std::move(all));
  if (all.empty()) return std::nullopt;
  Overlap overlap;
  overlap.span_ms = static_cast<double>(all.back().second - all.front().first) / 1e6;
  overlap.idle_ms = overlap.span_ms - static_cast<double>(length(all)) / 1e6;
  overlap.collectives_ms = static_cast<double>(length(collectives)) / 1e6;
  overlap.hidden_ms =
      static_cast<double>(common_length(collectives, merged(std::move(others)))) / 1e6;
  return overlap;
}

}  // namespace benchmark
