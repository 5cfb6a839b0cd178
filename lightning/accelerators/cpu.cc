// The host's processors. Source: Lightning 2.6, `CPUAccelerator`; psutil for the figures.
#include <unistd.h>

#include <fstream>
#include <sstream>
#include <unordered_map>

#include "lightning/accelerator.h"
#include "lightning/errors.h"
#include "lightning/registry.h"

namespace lightning {
namespace {

// "Name:   123 kB" lines of /proc/meminfo and /proc/self/status, in bytes.
std::unordered_map<std::string, double> read_kilobytes(const char* path) {
  std::unordered_map<std::string, double> values;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const auto colon = line.find(':');
    if (colon == std::string::npos) continue;
    std::istringstream rest(line.substr(colon + 1));
    double kilobytes = 0;
    if (rest >> kilobytes) values[line.substr(0, colon)] = kilobytes * 1024;
  }
  return values;
}

double percent(double part, double whole) { return whole > 0 ? 100.0 * part / whole : 0.0; }

// Ticks since the machine started: all, and those in which a processor had nothing to do.
struct Ticks {
  double all = 0;
  double idle = 0;
};

Ticks read_ticks() {
  std::ifstream file("/proc/stat");
  std::string label;
  file >> label;  // "cpu": all processors together
  // user nice system idle iowait irq softirq steal; guest time is in user already
  Ticks ticks;
  double value = 0;
  for (int column = 0; column < 8 && file >> value; ++column) {
    ticks.all += value;
    if (column == 3 || column == 4) ticks.idle += value;
  }
  return ticks;
}

class CPUAccelerator : public Accelerator {
 public:
  std::string name() const override { return "cpu"; }
  bool is_available() const override { return true; }
  int64_t auto_rank() const override { return 100; }

  std::vector<c10::Device> parse_devices(const DevicesFlag& devices) const override {
    return std::vector<c10::Device>(static_cast<size_t>(count(devices)), c10::Device(c10::kCPU));
  }

  void setup_device(c10::Device device) override {
    if (!device.is_cpu()) {
      throw MisconfigurationError(
          str("The accelerator \"cpu\" got the device ", device, ", expected cpu."));
    }
  }

  // cpu_percent is over the time since it was last asked for; at first since construction.
  std::vector<std::pair<std::string, double>> device_stats(c10::Device) const override {
    const auto memory = read_kilobytes("/proc/meminfo");
    const auto of = [&](const char* key) {
      const auto found = memory.find(key);
      return found == memory.end() ? 0.0 : found->second;
    };
    const Ticks now = read_ticks();
    const double busy = (now.all - now.idle) - (last_.all - last_.idle);
    const double cpu = percent(busy, now.all - last_.all);
    last_ = now;
    return {
        {"cpu_vm_percent", percent(of("MemTotal") - of("MemAvailable"), of("MemTotal"))},
        {"cpu_percent", cpu},
        {"cpu_swap_percent", percent(of("SwapTotal") - of("SwapFree"), of("SwapTotal"))},
    };
  }

  // The most memory this process ever had resident.
  int64_t peak_memory_bytes(c10::Device) const override {
    return static_cast<int64_t>(read_kilobytes("/proc/self/status")["VmHWM"]);
  }

 private:
  // Processes, each of which sees all processors.
  static int64_t count(const DevicesFlag& devices) {
    if (const auto* number = std::get_if<int64_t>(&devices)) return checked(*number, str(*number));
    if (const auto* list = std::get_if<std::vector<int64_t>>(&devices)) {
      std::vector<std::string> items;
      for (const auto item : *list) items.push_back(str(item));
      refuse("[" + join(items) + "]");
    }
    const auto& text = std::get<std::string>(devices);
    if (text == "auto") return 1;
    int64_t number = 0;
    std::istringstream in(text);
    if (!(in >> number) || !(in >> std::ws).eof()) refuse('"' + text + '"');
    return checked(number, '"' + text + '"');
  }

  static int64_t checked(int64_t number, const std::string& given) {
    if (number < 1) refuse(given);
    return number;
  }

  [[noreturn]] static void refuse(const std::string& given) {
    throw MisconfigurationError(
        str("devices got ", given,
            " with the accelerator \"cpu\", expected \"auto\" or a number of "
            "processes of at least 1. Processors are not chosen by index: "
            "one process uses them all."));
  }

  mutable Ticks last_ = read_ticks();
};

const Registration<Accelerator> kCPU{"cpu", "The processors of this machine.",
                                     [] { return std::make_unique<CPUAccelerator>(); }};

}  // namespace
}  // namespace lightning
