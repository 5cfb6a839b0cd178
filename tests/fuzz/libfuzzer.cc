// The same for libFuzzer, which finds its way by the branches that an input takes:
//
//   bazel build //tests/fuzz:libfuzzer
//   mkdir -p /tmp/corpus && bazel-bin/tests/fuzz/libfuzzer /tmp/corpus tests/fuzz/seeds
//
// LIGHTNING_SEEDS is the folder of the seeds, tests/fuzz/seeds where it is not set: our mutations
// put pieces of them together.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>

#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/mutate.h"

using namespace lightning::fuzz;

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace {

const Mutator& mutator() {
  const char* folder = std::getenv("LIGHTNING_SEEDS");
  static const Mutator one(read_inputs(folder == nullptr ? "tests/fuzz/seeds" : folder));
  return one;
}

// Of two formats that begin alike, any.
Format format_like(std::string_view bytes, Random& random) {
  if (bytes.substr(0, 2) == "PK") return Format::kTorchFile;
  if (bytes.size() > 8 && bytes[8] == '{') return Format::kSafetensors;
  return random.one_in(2) ? Format::kPickle : Format::kDcpMetadata;
}

}  // namespace

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size,
                                          unsigned int seed) {
  Random random(seed);
  if (size == 0 || random.one_in(2)) return LLVMFuzzerMutate(data, size, max_size);
  const std::string bytes(reinterpret_cast<const char*>(data), size);
  const auto mutant = mutator().mutate(format_like(bytes, random), bytes, random);
  const size_t kept = std::min(mutant.size(), max_size);
  std::memcpy(data, mutant.data(), kept);
  return kept;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  try {
    for (const Format format : kFormats) fuzz_one(format, bytes);
  } catch (const Violation& violation) {
    std::fprintf(stderr, "%s\n", violation.what());
    std::abort();
  }
  return 0;
}
