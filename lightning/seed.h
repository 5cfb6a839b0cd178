// Random numbers: one seed for all generators, and a scope that leaves them as they were.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "lightning/scope.h"

namespace lightning {

// Seeds LibTorch on all devices, notes the seed in PL_GLOBAL_SEED and whether loader workers derive
// theirs from it in PL_SEED_WORKERS. Without a seed PL_GLOBAL_SEED is taken, else 0 with a warning.
// Errors: MisconfigurationError for a seed outside 0 .. 2^32 - 1, or a PL_GLOBAL_SEED that is no
// number.
// Source: Lightning 2.6, `seed_everything`.
int64_t seed_everything(std::optional<int64_t> seed = std::nullopt, bool workers = false,
                        bool verbose = true);

// The default generators of the CPU and of all GPUs by device ("cpu", "cuda:0"), each with its
// state as LibTorch gives it, a tensor of bytes. Loading passes over devices that are not there.
std::vector<std::pair<std::string, at::Tensor>> generator_states();
void load_generator_states(const std::vector<std::pair<std::string, at::Tensor>>& states);

// Restores the state of the CPU's and all GPUs' generators when it ends.
// Source: Lightning 2.6, `isolate_rng`.
Scope isolate_rng();

}  // namespace lightning
