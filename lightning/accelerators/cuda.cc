// NVIDIA GPUs. Source: Lightning 2.6, `CUDAAccelerator`; torch 2.11, `torch.cuda.memory_stats`.
//
// Only the parts of LibTorch that a build without CUDA has too are called, so this links
// everywhere; no context is made on a device before setup_device().
#include <ATen/Context.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/cuda.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <sstream>

#include "lightning/accelerator.h"
#include "lightning/accelerators/nvidia.h"
#include "lightning/errors.h"
#include "lightning/log.h"
#include "lightning/registry.h"

// Only a LibTorch with CUDA installs the first header, and the toolkit's own may be missing.
#if __has_include(<c10/cuda/impl/cuda_cmake_macros.h>) && __has_include(<cuda_runtime_api.h>)
#include <c10/cuda/CUDAFunctions.h>
#define LIGHTNING_SYNC_DEBUG_
#endif

namespace lightning {
namespace {

using Stats = std::vector<std::pair<std::string, double>>;

// Null before anything was put on a GPU.
c10::DeviceAllocator* allocator() {
  if (torch::cuda::device_count() == 0) return nullptr;
  auto* found = c10::getDeviceAllocator(c10::kCUDA);
  return found->initialized() ? found : nullptr;
}

c10::DeviceIndex index_of(c10::Device device) {
  return device.has_index() ? device.index()
                            : c10::impl::getDeviceGuardImpl(c10::kCUDA)->getDevice().index();
}

void add(Stats& stats, const std::string& name, const c10::CachingAllocator::Stat& stat) {
  stats.emplace_back(name + ".current", stat.current);
  stats.emplace_back(name + ".peak", stat.peak);
  stats.emplace_back(name + ".allocated", stat.allocated);
  stats.emplace_back(name + ".freed", stat.freed);
}

void add(Stats& stats, const std::string& name, const c10::CachingAllocator::StatArray& pools) {
  using Type = c10::CachingAllocator::StatType;
  add(stats, name + ".all", pools[static_cast<size_t>(Type::AGGREGATE)]);
  add(stats, name + ".small_pool", pools[static_cast<size_t>(Type::SMALL_POOL)]);
  add(stats, name + ".large_pool", pools[static_cast<size_t>(Type::LARGE_POOL)]);
}

#ifdef LIGHTNING_SYNC_DEBUG_
// Holds for all threads of the program.
class SyncDebugGuard {
 public:
  explicit SyncDebugGuard(OnSync on_sync) : before_(state().get_sync_debug_mode()) {
    state().set_sync_debug_mode(on_sync == OnSync::kWarn ? Mode::L_WARN : Mode::L_ERROR);
  }
  ~SyncDebugGuard() { state().set_sync_debug_mode(before_); }
  SyncDebugGuard(const SyncDebugGuard&) = delete;
  SyncDebugGuard& operator=(const SyncDebugGuard&) = delete;

 private:
  using Mode = c10::cuda::SyncDebugMode;
  static c10::cuda::WarningState& state() { return c10::cuda::warning_state(); }

  Mode before_;
};
#endif

std::string shown(const DevicesFlag& devices) {
  if (const auto* count = std::get_if<int64_t>(&devices)) return str(*count);
  if (const auto* text = std::get_if<std::string>(&devices)) return '"' + *text + '"';
  std::vector<std::string> items;
  for (const auto index : std::get<std::vector<int64_t>>(devices)) items.push_back(str(index));
  return "[" + join(items) + "]";
}

[[noreturn]] void refuse(const DevicesFlag& devices, const std::string& reason) {
  const int64_t count = torch::cuda::device_count();
  const std::string have =
      count == 0   ? "This machine shows no CUDA device; use accelerator \"cpu\" or \"auto\"."
      : count == 1 ? "This machine has 1: cuda:0."
                   : str("This machine has ", count, ": cuda:0 to cuda:", count - 1, ".");
  throw MisconfigurationError(
      str("devices got ", shown(devices), " with the accelerator \"cuda\": ", reason, ". ", have));
}

constexpr const char* kForms =
    "expected a number of GPUs, -1 or \"auto\" for all, or indices as in \"0,1\" or [0, 1]";

// "2" is a number of GPUs, "0,1" and "1," are indices.
DevicesFlag read_text(const DevicesFlag& given, const std::string& text) {
  if (text == "auto") return int64_t{-1};
  std::vector<int64_t> numbers;
  std::istringstream items(text);
  for (std::string item; std::getline(items, item, ',');) {
    int64_t number = 0;
    std::istringstream in(item);
    if (!(in >> number) || !(in >> std::ws).eof()) refuse(given, kForms);
    numbers.push_back(number);
  }
  if (text.find(',') != std::string::npos) return numbers;
  if (numbers.size() != 1) refuse(given, kForms);
  return numbers[0];
}

std::vector<int64_t> first(const DevicesFlag& given, int64_t count) {
  const int64_t most = torch::cuda::device_count();
  if (count == 0 || count < -1) refuse(given, kForms);
  if (most == 0) refuse(given, "there is none");
  if (count > most) refuse(given, "there are not that many");
  std::vector<int64_t> indices(static_cast<size_t>(count == -1 ? most : count));
  std::iota(indices.begin(), indices.end(), int64_t{0});
  return indices;
}

void check(const DevicesFlag& given, std::vector<int64_t> indices) {
  if (indices.empty()) refuse(given, kForms);
  std::sort(indices.begin(), indices.end());
  if (std::adjacent_find(indices.begin(), indices.end()) != indices.end()) {
    refuse(given, "an index is there twice");
  }
  if (indices.front() < 0 || indices.back() >= torch::cuda::device_count()) {
    refuse(given, "not all of these exist");
  }
}

// Once in the life of the program, for GPUs with tensor cores that float32 products leave idle.
void advise_on_matmul_precision() {
  const bool exact =
      at::globalContext().float32MatmulPrecision() == at::Float32MatmulPrecision::HIGHEST;
  static bool advised = false;
  // LibTorch's generic interface tells of tensor cores by this question only (Ampere and later).
  const bool has_tensor_cores = at::detail::getCUDAHooks().supportsBFloat16ConvolutionWithCuDNNv8();
  if (advised || !exact || !has_tensor_cores) return;
  advised = true;
  info(
      "You are using a CUDA device that has Tensor Cores. To properly utilize them, you should "
      "call at::globalContext().setFloat32MatmulPrecision(\"medium\" or \"high\"), which will "
      "trade-off precision for performance.");
}

class CUDAAccelerator : public Accelerator {
 public:
  std::string name() const override { return "cuda"; }
  bool is_available() const override { return torch::cuda::device_count() > 0; }
  int64_t auto_rank() const override { return 10; }

  std::vector<c10::Device> parse_devices(const DevicesFlag& devices) const override {
    const auto* text = std::get_if<std::string>(&devices);
    const DevicesFlag read = text != nullptr ? read_text(devices, *text) : devices;
    const auto* count = std::get_if<int64_t>(&read);
    const auto indices =
        count != nullptr ? first(devices, *count) : std::get<std::vector<int64_t>>(read);
    check(devices, indices);
    std::vector<c10::Device> parsed;
    for (const auto index : indices) {
      parsed.emplace_back(c10::kCUDA, static_cast<c10::DeviceIndex>(index));
    }
    return parsed;
  }

  void setup_device(c10::Device device) override {
    if (!device.is_cuda()) {
      throw MisconfigurationError(
          str("The accelerator \"cuda\" got the device ", device, ", expected a GPU as cuda:0."));
    }
    at::globalContext().lazyInitDevice(c10::kCUDA);
    c10::impl::getDeviceGuardImpl(c10::kCUDA)->setDevice({c10::kCUDA, index_of(device)});
    advise_on_matmul_precision();
  }

  std::string device_name(c10::Device device) const override {
    return torch::cuda::device_count() == 0 ? "" : nvidia::gpu_name(index_of(device));
  }

  // The keys of `torch.cuda.memory_stats`, in its order; behind them the use of the GPU, where its
  // driver tells.
  Stats device_stats(c10::Device device) const override {
    if (torch::cuda::device_count() == 0) return {};
    Stats stats = memory_stats(device);
    for (auto& item : nvidia::gpu_use(index_of(device))) stats.push_back(std::move(item));
    return stats;
  }

  // Of tensors, as `torch.cuda.max_memory_allocated`; what the allocator keeps in reserve is not
  // in.
  int64_t peak_memory_bytes(c10::Device device) const override {
    auto* memory = allocator();
    if (memory == nullptr) return 0;
    const auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    return memory->getDeviceStats(index_of(device)).allocated_bytes[all].peak;
  }

  void synchronize(c10::Device device) const override {
    if (allocator() != nullptr) torch::cuda::synchronize(index_of(device));
  }

  // Gives memory that is kept for later tensors back to the device.
  void teardown() override {
    if (auto* memory = allocator()) memory->emptyCache();
  }

#ifdef LIGHTNING_SYNC_DEBUG_
  Scope sync_debug_scope(OnSync on_sync) const override {
    return on_sync == OnSync::kNothing ? nullptr : make_scope<SyncDebugGuard>(on_sync);
  }
#endif

 private:
  static Stats memory_stats(c10::Device device) {
    Stats stats;
    auto* memory = allocator();
    if (memory == nullptr) return stats;
    const auto found = memory->getDeviceStats(index_of(device));
    add(stats, "allocation", found.allocation);
    add(stats, "segment", found.segment);
    add(stats, "active", found.active);
    add(stats, "inactive_split", found.inactive_split);
    add(stats, "allocated_bytes", found.allocated_bytes);
    add(stats, "reserved_bytes", found.reserved_bytes);
    add(stats, "active_bytes", found.active_bytes);
    add(stats, "inactive_split_bytes", found.inactive_split_bytes);
    add(stats, "requested_bytes", found.requested_bytes);
    add(stats, "oversize_allocations", found.oversize_allocations);
    add(stats, "oversize_segments", found.oversize_segments);
    stats.emplace_back("num_alloc_retries", found.num_alloc_retries);
    stats.emplace_back("num_ooms", found.num_ooms);
    stats.emplace_back("num_sync_all_streams", found.num_sync_all_streams);
    stats.emplace_back("num_device_alloc", found.num_device_alloc);
    stats.emplace_back("num_device_free", found.num_device_free);
    stats.emplace_back("max_split_size", found.max_split_size);
    std::sort(stats.begin(), stats.end());
    return stats;
  }
};

const Registration<Accelerator> kCUDA{"cuda", "The NVIDIA GPUs of this machine.",
                                      [] { return std::make_unique<CUDAAccelerator>(); }};
const Registration<Accelerator> kGPU{"gpu", "The same as cuda.",
                                     [] { return std::make_unique<CUDAAccelerator>(); }};

}  // namespace
}  // namespace lightning
