#include <torch/torch.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <chrono>
#include <map>

#include "lightning/accelerator.h"
#include "lightning/accelerators/nvidia.h"
#include "lightning/errors.h"
#include "lightning/registry.h"
#include "tests/support/python.h"

using Catch::Matchers::Contains;
using namespace lightning;

namespace {

using Indices = std::vector<int64_t>;

std::map<std::string, double> stats_of(const Accelerator& accelerator, c10::Device device) {
  const auto stats = accelerator.device_stats(device);
  return {stats.begin(), stats.end()};
}

// What NVML adds, with what it may be.
const std::map<std::string, std::pair<double, double>>& in_use() {
  static const std::map<std::string, std::pair<double, double>> ranges{
      {"gpu_utilization_percent", {0, 100}},
      {"memory_utilization_percent", {0, 100}},
      {"temperature_celsius", {5, 120}},
      {"power_watts", {5, 2000}}};
  return ranges;
}

// 50 ms of work, which /proc/stat counts in ticks of 10 ms.
void be_busy() {
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(50);
  while (std::chrono::steady_clock::now() < end) {
  }
}

}  // namespace

TEST_CASE("every accelerator tells its name, and refuses no devices at all", "[accelerators]") {
  for (const auto& name : registry<Accelerator>().names()) {
    INFO(name);
    const auto accelerator = registry<Accelerator>().make(name);
    CHECK(accelerator->name() == (name == "gpu" ? "cuda" : name));
    CHECK(accelerator->auto_rank() >= 0);
    for (const DevicesFlag& none :
         {DevicesFlag(int64_t{0}), DevicesFlag("0"), DevicesFlag(Indices{}), DevicesFlag("x"),
          DevicesFlag("1 2"), DevicesFlag(""), DevicesFlag(int64_t{-2})}) {
      CHECK_THROWS_AS(accelerator->parse_devices(none), MisconfigurationError);
    }
    CHECK_THROWS_AS(accelerator->setup_device(at::kMeta), MisconfigurationError);
  }
}

TEST_CASE("the cpu takes a number of processes and says so", "[accelerators]") {
  const auto cpu = registry<Accelerator>().make("cpu");
  CHECK(cpu->is_available());
  CHECK(cpu->parse_devices("auto") == std::vector<c10::Device>{at::kCPU});
  CHECK(cpu->parse_devices(int64_t{3}).size() == 3);
  CHECK(cpu->parse_devices(" 2 ").size() == 2);
  CHECK_THROWS_WITH(cpu->parse_devices(int64_t{-1}),
                    Contains("devices got -1") && Contains("at least 1"));
  CHECK_THROWS_WITH(cpu->parse_devices("0,1"), Contains("got \"0,1\""));
  CHECK_THROWS_WITH(cpu->parse_devices(Indices{0, 1}), Contains("got [0, 1]"));
}

TEST_CASE("the cpu's figures have Python's names, in percent of the machine", "[accelerators]") {
  const auto cpu = registry<Accelerator>().make("cpu");
  be_busy();
  std::vector<std::string> names;
  for (const auto& [name, value] : cpu->device_stats(at::kCPU)) {
    INFO(name);
    names.push_back(name);
    CHECK(value <= 100);
    CHECK(value >= 0);
  }
  CHECK(names == std::vector<std::string>{"cpu_vm_percent", "cpu_percent", "cpu_swap_percent"});
  be_busy();
  auto stats = stats_of(*cpu, at::kCPU);
  CHECK(stats["cpu_percent"] > 0);
  const double pages = sysconf(_SC_AVPHYS_PAGES), all = sysconf(_SC_PHYS_PAGES);
  CHECK(stats["cpu_vm_percent"] > 0);
  CHECK(stats["cpu_vm_percent"] <= 100 * (1 - pages / all) + 5);  // caches count as available
}

TEST_CASE("the cpu's peak memory stays when memory is given back", "[accelerators]") {
  const auto cpu = registry<Accelerator>().make("cpu");
  const auto before = cpu->peak_memory_bytes(at::kCPU);
  const int64_t more = 200 << 20;
  { const auto block = torch::ones({before + more}, torch::kByte); }
  CHECK(cpu->peak_memory_bytes(at::kCPU) >= before + more);
}

TEST_CASE("where there is no GPU, cuda says so and touches nothing", "[accelerators]") {
  const auto cuda = registry<Accelerator>().make("cuda");
  if (cuda->is_available()) {
    WARN("needs a machine without GPU");
    return;
  }
  for (const DevicesFlag& some : {DevicesFlag("auto"), DevicesFlag(int64_t{-1}),
                                  DevicesFlag(int64_t{1}), DevicesFlag(Indices{0})}) {
    CHECK_THROWS_WITH(cuda->parse_devices(some),
                      Contains("no CUDA device") && Contains("accelerator \"cpu\""));
  }
  CHECK(cuda->device_stats(at::kCUDA).empty());
  CHECK(cuda->peak_memory_bytes(at::kCUDA) == 0);
  cuda->synchronize(at::kCUDA);
  cuda->teardown();
  CHECK(cuda->device_name(at::kCUDA).empty());
  CHECK(nvidia::gpu_name(0).empty());
  CHECK(nvidia::compute_capability(0) == 0);
  CHECK(nvidia::gpu_use(0).empty());
}

TEST_CASE("only a device beside the host can be watched for waiting", "[accelerators]") {
  CHECK(registry<Accelerator>().make("cpu")->sync_debug_scope(OnSync::kError) == nullptr);
  const auto cuda = registry<Accelerator>().make("cuda");
  CHECK(cuda->sync_debug_scope(OnSync::kNothing) == nullptr);
}

TEST_CASE("cuda chooses GPUs by number, list and text", "[accelerators][gpu]") {
  const auto cuda = registry<Accelerator>().make("gpu");
  if (!cuda->is_available()) {
    WARN("needs a GPU");
    return;
  }
  const auto count = static_cast<int64_t>(torch::cuda::device_count());
  const std::vector<c10::Device> first{c10::Device("cuda:0")};
  CHECK(cuda->parse_devices(int64_t{1}) == first);
  CHECK(cuda->parse_devices("1") == first);
  CHECK(cuda->parse_devices("0,") == first);
  CHECK(cuda->parse_devices(Indices{0}) == first);
  for (const DevicesFlag& all :
       {DevicesFlag("auto"), DevicesFlag("-1"), DevicesFlag(int64_t{-1})}) {
    CHECK(static_cast<int64_t>(cuda->parse_devices(all).size()) == count);
  }
  CHECK_THROWS_WITH(cuda->parse_devices(count + 1), Contains(str("has ", count)));
  CHECK_THROWS_WITH(cuda->parse_devices(Indices{count}), Contains("not all of these exist"));
  CHECK_THROWS_WITH(cuda->parse_devices(Indices{0, 0}), Contains("twice"));
}

TEST_CASE("cuda tells how busy, warm and hungry a GPU is, where its library is there",
          "[accelerators][gpu]") {
  const auto cuda = registry<Accelerator>().make("cuda");
  if (!cuda->is_available()) {
    WARN("needs a GPU");
    return;
  }
  CHECK_FALSE(cuda->device_name(c10::Device("cuda:0")).empty());
  CHECK(nvidia::compute_capability(0) >= 30);
  const auto use = nvidia::gpu_use(0);
  for (const auto& [name, value] : use) {
    INFO(name << " " << value);
    REQUIRE(in_use().count(name) == 1);
    CHECK(value >= in_use().at(name).first);
    CHECK(value <= in_use().at(name).second);
  }
  if (use.empty()) WARN("this machine has no NVML");
  auto stats = stats_of(*cuda, c10::Device("cuda:0"));
  for (const auto& item : use) CHECK(stats.count(item.first) == 1);
}

TEST_CASE("cuda's figures have the names of torch.cuda.memory_stats", "[accelerators][gpu]") {
  const auto cuda = registry<Accelerator>().make("cuda");
  if (!cuda->is_available()) {
    WARN("needs a GPU");
    return;
  }
  const c10::Device device("cuda:0");
  cuda->setup_device(device);
  { const auto block = torch::ones({64, 1 << 20}, device); }
  cuda->synchronize(device);
  auto stats = stats_of(*cuda, device);
  CHECK(stats["allocated_bytes.all.peak"] >= 256 << 20);
  CHECK(stats["allocated_bytes.all.current"] < 256 << 20);
  CHECK(cuda->peak_memory_bytes(device) == static_cast<int64_t>(stats["allocated_bytes.all.peak"]));

  std::string names;
  for (const auto& item : cuda->device_stats(device)) {
    if (in_use().count(item.first) == 0) names += item.first + "\n";
  }
  CHECK(names == testing::run_python(R"(
import torch
torch.ones(1, device="cuda")
print("\n".join(torch.cuda.memory_stats()))
)"));
  cuda->teardown();
  CHECK(stats_of(*cuda, device)["reserved_bytes.all.current"] < 256 << 20);
}
