// Runs many inputs in a process of its own, so that one that ends the process is named and the
// others go on.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "tests/fuzz/input.h"

namespace lightning::fuzz {

struct Report {
  uint64_t read = 0;
  uint64_t refused = 0;
  double seconds = 0;
  double slowest_seconds = 0;  // of one input, of the processor's time
  std::string slowest;
  double most_bytes_per_byte = 0;  // allocated, of inputs of at least 1000 bytes
  std::string hungriest;
  std::vector<std::string> failures;  // "mutant 17 of small.pt: ..."; it stops after some

  std::string words() const;
};

struct RunOptions {
  uint64_t stack_bytes = uint64_t{1} << 18;  // none of the readers recurses
  double most_seconds = 5;                   // for one input
};

// Makes and tries the inputs from `first` on, each on a small stack. An input fails that ends the
// process, that takes longer than it may, for which `trial` throws, or which is not all freed (but
// by the first trials: `warm_up` runs once before them). Failed ones lie in the folder of
// save_failures(), under their names.
Report run_inputs(uint64_t first, uint64_t count, const std::function<Input(uint64_t)>& make,
                  const std::function<Outcome(const Input&)>& trial,
                  const std::function<void()>& warm_up, const RunOptions& options = {});

// The number in an environment variable; `otherwise` where it is not set.
uint64_t number_from(const char* variable, uint64_t otherwise);

}  // namespace lightning::fuzz
