#include "lightning/throughput.h"

#include <algorithm>
#include <numeric>

#include "lightning/errors.h"

namespace lightning {
namespace {

template <class T>
void append(std::deque<T>& window, T value, int64_t size, const char* what) {
  if (!window.empty() && window.back() >= value) {
    throw MisconfigurationError(str("Throughput got ", what, " ", value, " after ", window.back(),
                                    ", expected a total that grows with each update."));
  }
  window.push_back(value);
  if (window.size() > static_cast<size_t>(size)) window.pop_front();
}

template <class T>
double elapsed(const std::deque<T>& window) {
  return static_cast<double>(window.back() - window.front());
}

// TFLOPS without sparsity; 0 where the device has no such mode.
struct Peak {
  std::vector<std::string> needles;  // all of them are in the name, in lower case
  double fp64, fp32, tf32, bf16, fp16, int8;
};

// The first that fits counts: longer names come before their beginnings.
const std::vector<Peak>& peaks() {
  static const std::vector<Peak> table = {
      {{"b200"}, 37, 75, 1100, 2250, 2250, 4500},
      {{"h200", "nvl"}, 30, 60, 417.5, 835.5, 835.5, 1670.5},
      {{"h200"}, 33.5, 66.9, 494.7, 989.4, 989.4, 1978.9},
      {{"h100", "nvl"}, 30, 60, 417.5, 835.5, 835.5, 1670.5},
      {{"h100", "pcie"}, 25.6, 51.2, 378, 756, 756, 1513},
      {{"h100"}, 33.5, 66.9, 494.7, 989.4, 989.4, 1978.9},
      {{"a100"}, 9.7, 19.5, 156, 312, 312, 624},
      {{"a6000"}, 0, 38.7, 77.4, 154.8, 154.8, 309.7},
      {{"a40"}, 0, 37.4, 74.8, 149.7, 149.7, 299.3},
      {{"a10"}, 0, 31.2, 62.5, 125, 125, 250},
      {{"l40s"}, 0, 91.6, 183, 362, 362, 733},
      {{"l40"}, 0, 90.5, 90.5, 181, 181, 362},
      {{"l4"}, 0, 30.3, 60, 121, 121, 242},
      {{"rtx 4090"}, 0, 82.6, 82.6, 165.2, 165.2, 660.6},
      {{"rtx 4080 super"}, 0, 52.2, 52.2, 104.4, 104.4, 417.6},
      {{"rtx 4080"}, 0, 48.7, 48.7, 97.5, 97.5, 389.9},
      {{"rtx 3090 ti"}, 0, 40, 40, 80, 80, 320},
      {{"rtx 3090"}, 0, 35.6, 35.6, 71, 71, 284},
      {{"rtx 3080 ti"}, 0, 34.1, 34.1, 68.2, 68.2, 272.8},
      {{"rtx 3080"}, 0, 29.8, 29.8, 59.5, 59.5, 238},
      {{"rtx 3070"}, 0, 20.3, 20.3, 40.6, 40.6, 162.6},
      {{"v100s"}, 8.2, 16.4, 0, 0, 130, 0},
      {{"v100", "pcie"}, 7, 14, 0, 0, 112, 0},
      {{"v100"}, 7.8, 15.7, 0, 0, 125, 0},
      {{"t4"}, 0, 8.1, 0, 0, 65, 130},
  };
  return table;
}

double of(const Peak& peak, c10::ScalarType dtype, bool tf32) {
  switch (dtype) {
    case c10::kDouble:
      return peak.fp64;
    case c10::kFloat:
      return tf32 && peak.tf32 > 0 ? peak.tf32 : peak.fp32;
    case c10::kBFloat16:
      return peak.bf16;
    case c10::kHalf:
      return peak.fp16;
    case c10::kChar:
      return peak.int8;
    default:
      return 0;
  }
}

}  // namespace

Throughput::Throughput(ThroughputOptions options, double available_flops, int64_t world_size)
    : options_(std::move(options)), available_flops_(available_flops), world_size_(world_size) {
  if (options_.window_size() < 2) {
    throw MisconfigurationError(str("Throughput got window_size ", options_.window_size(),
                                    ", expected at least 2: a rate lies between two updates."));
  }
}

void Throughput::update(const Update& update) {
  const int64_t size = options_.window_size();
  if (update.samples < update.batches) {
    throw MisconfigurationError(str("Throughput got ", update.samples, " samples in ",
                                    update.batches, " batches, expected one in each at least."));
  }
  if (update.lengths && *update.lengths < update.samples) {
    throw MisconfigurationError(str("Throughput got ", *update.lengths, " items in ",
                                    update.samples, " samples, expected one in each at least."));
  }
  if (update.lengths && lengths_.size() != samples_.size()) {
    throw MisconfigurationError(str("Throughput got lengths at ", lengths_.size(), " of ",
                                    samples_.size(),
                                    " updates, expected them at all updates or at none."));
  }
  append(time_, update.time, size, "time");
  append(batches_, update.batches, size, "batches");
  append(samples_, update.samples, size, "samples");
  if (update.lengths) append(lengths_, *update.lengths, size, "lengths");
  if (update.flops) {
    flops_.push_back(static_cast<double>(*update.flops * world_size_));
    if (flops_.size() > static_cast<size_t>(size)) flops_.pop_front();
  }
}

std::vector<std::pair<std::string, double>> Throughput::compute() const {
  if (time_.empty()) return {};
  std::vector<std::pair<std::string, double>> metrics = {
      {"time", time_.back()},
      {"batches", static_cast<double>(batches_.back())},
      {"samples", static_cast<double>(samples_.back())}};
  if (!lengths_.empty()) metrics.emplace_back("lengths", static_cast<double>(lengths_.back()));
  if (!full(time_.size())) return metrics;

  const double seconds = elapsed(time_);
  const auto world = static_cast<double>(world_size_);
  const auto add = [&](const char* name, double of_device) {
    metrics.emplace_back("device" + options_.separator() + name, of_device);
    if (world_size_ > 1) metrics.emplace_back(name, of_device * world);
  };
  add("batches_per_sec", elapsed(batches_) / seconds);
  add("samples_per_sec", elapsed(samples_) / seconds);
  if (full(lengths_.size())) add("items_per_sec", elapsed(lengths_) / seconds);
  if (full(flops_.size())) {
    // The first update's operations were done before the window began.
    const double done = std::accumulate(flops_.begin() + 1, flops_.end(), 0.0);
    const double of_device = done / seconds / world;
    add("flops_per_sec", of_device);
    if (available_flops_ > 0) {
      metrics.emplace_back("device" + options_.separator() + "mfu", of_device / available_flops_);
    }
  }
  return metrics;
}

void Throughput::reset() {
  time_.clear();
  batches_.clear();
  samples_.clear();
  lengths_.clear();
  flops_.clear();
}

std::optional<double> Throughput::last_time() const {
  if (time_.empty()) return std::nullopt;
  return time_.back();
}

std::optional<double> available_flops(const std::string& name, c10::ScalarType dtype, bool tf32) {
  std::string lower = name;
  for (char& c : lower) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  for (const Peak& peak : peaks()) {
    const bool fits = std::all_of(
        peak.needles.begin(), peak.needles.end(),
        [&lower](const std::string& needle) { return lower.find(needle) != std::string::npos; });
    if (!fits) continue;
    const double tera = of(peak, dtype, tf32);
    return tera > 0 ? std::optional<double>(tera * 1e12) : std::nullopt;
  }
  return std::nullopt;
}

}  // namespace lightning
