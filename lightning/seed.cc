#include "lightning/seed.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "lightning/errors.h"
#include "lightning/log.h"

namespace lightning {

int64_t seed_everything(std::optional<int64_t> seed, bool workers, bool verbose) {
  if (!seed) {
    const char* given = std::getenv("PL_GLOBAL_SEED");
    if (given == nullptr) {
      if (verbose) warn("No seed was given: 0 is used.");
      seed = 0;
    } else {
      char* end = nullptr;
      seed = std::strtoll(given, &end, 10);
      if (*given == '\0' || *end != '\0') {
        throw MisconfigurationError(
            str("PL_GLOBAL_SEED is \"", given, "\", expected a whole number."));
      }
    }
  }
  if (*seed < 0 || *seed > int64_t{UINT32_MAX}) {
    throw MisconfigurationError(
        str("seed_everything got ", *seed, ", expected 0 to ", UINT32_MAX, "."));
  }
  if (verbose) info(str("Seed set to ", *seed));
  setenv("PL_GLOBAL_SEED", std::to_string(*seed).c_str(), 1);
  setenv("PL_SEED_WORKERS", workers ? "1" : "0", 1);
  at::manual_seed(static_cast<uint64_t>(*seed));
  return *seed;
}

namespace {

std::vector<std::pair<std::string, at::Generator>> generators() {
  std::vector<std::pair<std::string, at::Generator>> all;
  all.emplace_back("cpu", at::detail::getDefaultCPUGenerator());
  if (at::hasCUDA()) {
    for (c10::DeviceIndex i = 0; i < static_cast<c10::DeviceIndex>(at::getNumGPUs()); ++i) {
      all.emplace_back(str("cuda:", static_cast<int>(i)),
                       at::globalContext().defaultGenerator(at::Device(at::kCUDA, i)));
    }
  }
  return all;
}

}  // namespace

std::vector<std::pair<std::string, at::Tensor>> generator_states() {
  std::vector<std::pair<std::string, at::Tensor>> states;
  for (auto& [device, generator] : generators()) states.emplace_back(device, generator.get_state());
  return states;
}

void load_generator_states(const std::vector<std::pair<std::string, at::Tensor>>& states) {
  for (auto& [device, generator] : generators()) {
    for (const auto& [of, state] : states) {
      if (of == device) generator.set_state(state);
    }
  }
}

Scope isolate_rng() {
  return scope_exit([states = generator_states()] { load_generator_states(states); });
}

}  // namespace lightning
