#include "lightning/accelerators/nvidia.h"

#include <dlfcn.h>

namespace lightning::nvidia {
namespace {

// A function of a library; null where either is missing.
template <class F>
F* function(void* library, const char* name) {
  return library == nullptr ? nullptr : reinterpret_cast<F*>(dlsym(library, name));
}

// The functions of CUDA's driver interface that are wanted, with the types of cuda.h.
struct Driver {
  // Loaded by LibTorch when it first looks for devices, and never unloaded.
  void* library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
  int (*device_of)(int*, int) = function<int(int*, int)>(library, "cuDeviceGet");
  int (*name_of)(char*, int, int) = function<int(char*, int, int)>(library, "cuDeviceGetName");
  int (*attribute_of)(int*, int, int) = function<int(int*, int, int)>(library,
                                                                      "cuDeviceGetAttribute");
  int (*bus_id_of)(char*, int, int) = function<int(char*, int, int)>(library,
                                                                     "cuDeviceGetPCIBusId");

  // False where there is no such device.
  bool find(int index, int& device) const {
    const bool complete = device_of && name_of && attribute_of && bus_id_of;
    return complete && device_of(&device, index) == 0;
  }
};

// Asked for anew until LibTorch has loaded it.
const Driver& driver() {
  static Driver driver;
  if (driver.library == nullptr) driver = Driver();
  return driver;
}

// The functions of NVML that are wanted, with the types of nvml.h.
struct Management {
  using Device = void*;
  struct Utilization {
    unsigned gpu = 0, memory = 0;
  };
  static constexpr int kGPUSensor = 0;

  void* library = dlopen("libnvidia-ml.so.1", RTLD_LAZY);
  int (*device_of)(const char*, Device*) =
      function<int(const char*, Device*)>(library, "nvmlDeviceGetHandleByPciBusId_v2");
  int (*utilization_of)(Device, Utilization*) =
      function<int(Device, Utilization*)>(library, "nvmlDeviceGetUtilizationRates");
  int (*temperature_of)(Device, int, unsigned*) =
      function<int(Device, int, unsigned*)>(library, "nvmlDeviceGetTemperature");
  int (*milliwatts_of)(Device,
                       unsigned*) = function<int(Device, unsigned*)>(library,
                                                                     "nvmlDeviceGetPowerUsage");
  bool works = start();

 private:
  bool start() const {
    auto* const init = function<int()>(library, "nvmlInit_v2");
    return init != nullptr && device_of != nullptr && init() == 0;
  }
};

// Started once; it stays until the program ends.
const Management& management() {
  static const Management management;
  return management;
}

}  // namespace

std::string gpu_name(int index) {
  char name[256] = "";
  int device = 0;
  const bool found =
      driver().find(index, device) && driver().name_of(name, sizeof(name), device) == 0;
  return found ? name : "";
}

int compute_capability(int index) {
  constexpr int kMajor = 75, kMinor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_...
  int device = 0, major = 0, minor = 0;
  const bool found = driver().find(index, device) &&
                     driver().attribute_of(&major, kMajor, device) == 0 &&
                     driver().attribute_of(&minor, kMinor, device) == 0;
  return found ? 10 * major + minor : 0;
}

std::vector<std::pair<std::string, double>> gpu_use(int index) {
  int device = 0;
  char bus_id[32] = "";
  if (!driver().find(index, device) || driver().bus_id_of(bus_id, sizeof(bus_id), device) != 0) {
    return {};
  }
  const Management& nvml = management();
  Management::Device handle = nullptr;
  if (!nvml.works || nvml.device_of(bus_id, &handle) != 0) return {};

  std::vector<std::pair<std::string, double>> use;
  Management::Utilization utilization;
  if (nvml.utilization_of && nvml.utilization_of(handle, &utilization) == 0) {
    use.emplace_back("gpu_utilization_percent", utilization.gpu);
    use.emplace_back("memory_utilization_percent", utilization.memory);
  }
  unsigned value = 0;
  if (nvml.temperature_of && nvml.temperature_of(handle, Management::kGPUSensor, &value) == 0) {
    use.emplace_back("temperature_celsius", value);
  }
  if (nvml.milliwatts_of && nvml.milliwatts_of(handle, &value) == 0) {
    use.emplace_back("power_watts", value / 1000.0);
  }
  return use;
}

}  // namespace lightning::nvidia
