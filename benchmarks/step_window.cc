#include "benchmarks/step_window.h"

#include <c10/core/CachingDeviceAllocator.h>
#include <dlfcn.h>
#include <torch/cuda.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <unordered_set>

#include "lightning/module.h"
#include "lightning/trainer.h"
#include "loggers/csv_logger.h"

namespace benchmark {
namespace {

constexpr double kPeakFlops = 989e12;  // dense bf16 of an H100 or H200

// What the first GPU used since the driver was loaded; nullopt where it does not say.
std::optional<double> gpu_joules() {
  static void* const nvml = dlopen("libnvidia-ml.so.1", RTLD_LAZY);
  if (nvml == nullptr) return std::nullopt;
  using Init = int (*)();
  using GetHandle = int (*)(unsigned index, void** device);
  using GetEnergy = int (*)(void* device, unsigned long long* millijoules);
  static const auto init = reinterpret_cast<Init>(dlsym(nvml, "nvmlInit_v2"));
  static const auto get_handle =
      reinterpret_cast<GetHandle>(dlsym(nvml, "nvmlDeviceGetHandleByIndex_v2"));
  static const auto get_energy =
      reinterpret_cast<GetEnergy>(dlsym(nvml, "nvmlDeviceGetTotalEnergyConsumption"));
  if (init == nullptr || get_handle == nullptr || get_energy == nullptr) return std::nullopt;
  static const bool is_ready = init() == 0;
  void* device = nullptr;
  unsigned long long millijoules = 0;
  if (!is_ready || get_handle(0, &device) != 0 || get_energy(device, &millijoules) != 0) {
    return std::nullopt;
  }
  return static_cast<double>(millijoules) / 1e3;
}

// Of all tensors on the device.
c10::CachingAllocator::Stat tensor_bytes(c10::Device device) {
  if (!device.is_cuda()) return {};
  const auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
  return c10::getDeviceAllocator(c10::kCUDA)
      ->getDeviceStats(std::max<c10::DeviceIndex>(device.index(), 0))
      .allocated_bytes[all];
}

}  // namespace

Arguments::Arguments(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name.rfind("--", 0) != 0) continue;
    const bool has_value = i + 1 < argc && std::string(argv[i + 1]).rfind("--", 0) != 0;
    given_[name.substr(2)] = has_value ? argv[i + 1] : "";
  }
}

std::string Arguments::text(const std::string& name, const std::string& otherwise) const {
  const auto found = given_.find(name);
  return found == given_.end() ? otherwise : found->second;
}

int64_t Arguments::number(const std::string& name, int64_t otherwise) const {
  const auto found = given_.find(name);
  return found == given_.end() ? otherwise : std::stoll(found->second);
}

StepWindow::StepWindow(const Arguments& arguments)
    : warmup_(arguments.number("warmup", 20)),
      steps_(arguments.number("steps", 30)),
      windows_(arguments.number("windows", 2)),
      overlap_steps_(arguments.number("overlap", 0)),
      prints_(arguments.number("profile", 0) != 0),
      traced_(overlap_steps_ > 0 ? overlap_steps_
              : prints_          ? steps_
                                 : 0) {}

void StepWindow::on_train_batch_end(lightning::Trainer& trainer, lightning::LightningModule& module,
                                    const lightning::StepOutput&, const lightning::Batch&,
                                    int64_t) {
  is_global_zero_ = trainer.is_global_zero();
  count(module.device());
}

void StepWindow::count(c10::Device device) {
  ++done_;
  const auto timed = warmup_ + steps_ * windows_;
  if (done_ >= warmup_ && done_ <= timed && (done_ - warmup_) % steps_ == 0) {
    if (device.is_cuda()) torch::cuda::synchronize(device.index());
    times_.push_back(Clock::now());
    joules_.push_back(gpu_joules());
    peak_bytes_ = static_cast<double>(tensor_bytes(device).peak);
  }
  trace(device);
}

void StepWindow::trace(c10::Device device) {
  if (traced_ == 0) return;
  if (done_ == total() - traced_) start_trace(device);
  if (done_ != total()) return;
  const auto kernels = stop_trace(device);
  overlap_ = overlap_of(kernels);
  for (const auto& kernel : kernels) {
    auto& [milliseconds, calls] = kernels_[kernel.name];
    milliseconds +=
        static_cast<double>(kernel.end_ns - kernel.begin_ns) / 1e6 / static_cast<double>(traced_);
    ++calls;
  }
}

void StepWindow::print_profile() const {
  if (!prints_) return;
  std::vector<std::pair<double, std::string>> sorted;
  double all = 0;
  for (const auto& [name, of] : kernels_) {
    all += of.first;
    sorted.emplace_back(of.first, name);
  }
  std::sort(sorted.rbegin(), sorted.rend());
  if (!sorted.empty()) std::printf("%8.3f ms a step in kernels\n", all);
  for (const auto& [milliseconds, name] : sorted) {
    std::printf("%8.3f ms %6.1f calls  %.150s\n", milliseconds,
                static_cast<double>(kernels_.at(name).second) / static_cast<double>(traced_),
                name.c_str());
  }
}

double StepWindow::milliseconds() const {
  std::vector<double> each;
  for (size_t i = 1; i < times_.size(); ++i) {
    const std::chrono::duration<double, std::milli> taken = times_[i] - times_[i - 1];
    each.push_back(taken.count() / static_cast<double>(steps_));
  }
  if (each.empty()) return 0;
  std::sort(each.begin(), each.end());
  const size_t middle = each.size() / 2;
  return each.size() % 2 == 1 ? each[middle] : (each[middle - 1] + each[middle]) / 2;
}

std::optional<double> StepWindow::joules() const {
  if (joules_.empty() || !joules_.front() || !joules_.back()) return std::nullopt;
  return (*joules_.back() - *joules_.front()) / static_cast<double>(steps_ * windows_);
}

double tensor_gigabytes(c10::Device device) {
  return static_cast<double>(tensor_bytes(device).current) / 1e9;
}

lightning::DataLoader next_tokens(const at::Tensor& rows, int64_t batch) {
  const auto samples = lightning::Batch::map(
      {{"x", rows.slice(1, 0, -1).contiguous()}, {"y", rows.slice(1, 1).contiguous()}});
  return {lightning::TensorDataset(samples),
          lightning::DataLoaderOptions(batch).pin_memory(torch::cuda::is_available())};
}

double flops_per_token(const torch::nn::Module& module, int64_t layers, int64_t width,
                       int64_t context) {
  std::unordered_set<const void*> seen;
  int64_t elements = 0;
  for (const auto& parameter : module.parameters()) {
    if (seen.insert(parameter.unsafeGetTensorImpl()).second) elements += parameter.numel();
  }
  return 6.0 * static_cast<double>(elements) + 12.0 * static_cast<double>(layers * width * context);
}

lightning::TrainerOptions trainer_options(const Arguments& arguments,
                                          const std::string& precision) {
  const auto folder = arguments.text("folder", ".");
  return lightning::TrainerOptions()
      .accelerator(arguments.text("accelerator", "cuda"))
      .devices(arguments.number("devices", 1))
      .precision(arguments.text("precision", precision))
      .benchmark(true)
      .default_root_dir(folder)
      .logger(lightning::CSVLoggerOptions(folder));
}

void report(const Arguments& arguments, const std::string& name, const StepWindow& window,
            int64_t tokens, double flops_per_token, const Values& more) {
  const double per_second = static_cast<double>(tokens) / window.milliseconds() * 1e3;
  Values values = {{"ms", window.milliseconds()},
                   {"tokens_s", per_second},
                   {"mfu", flops_per_token * per_second / kPeakFlops},
                   {"peak_gb", window.peak_gigabytes()}};
  if (const auto joules = window.joules()) values.emplace_back("joules", *joules);
  if (const auto& overlap = window.overlap()) {
    if (overlap->collectives_ms > 0) {
      values.emplace_back("collectives_ms", overlap->collectives_ms);
      values.emplace_back("hidden", overlap->share());
    }
    values.emplace_back("idle", overlap->idle_ms / overlap->span_ms);
  }
  values.insert(values.end(), more.begin(), more.end());
  report(arguments, name, values);
  window.print_profile();
}

void report(const Arguments& arguments, const std::string& name, const Values& values) {
  std::ostringstream line;
  line.precision(10);
  line << "{\"name\": \"" << name << '"';
  for (const auto& [key, value] : values) line << ", \"" << key << "\": " << value;
  line << "}\n";
  std::printf("\nRESULT %s", line.str().c_str());
  std::fflush(stdout);
  const auto path = arguments.text("results", "");
  if (!path.empty()) std::ofstream(path, std::ios::app) << line.str();
}

}  // namespace benchmark
