// What the fuzzers feed to the readers, and what came of it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lightning::fuzz {

enum class Format {
  kTorchFile,    // a zip of torch.save
  kPickle,       // of any of the protocols 2 to 5
  kDcpMetadata,  // the .metadata of a sharded folder, a pickle
  kSafetensors,
};
inline constexpr Format kFormats[] = {Format::kTorchFile, Format::kPickle, Format::kDcpMetadata,
                                      Format::kSafetensors};

struct Input {
  Format format = Format::kTorchFile;
  std::string name;  // for messages
  std::string bytes;
};

struct Outcome {
  bool read = false;        // else refused, by CheckpointError
  uint64_t peak_bytes = 0;  // allocated at a time
  int64_t left_bytes = 0;   // never freed
};

// The files of a folder, by name; their endings tell the formats: .pt and .ckpt, .pickle,
// .metadata, .safetensors. Errors: std::runtime_error where there are none.
std::vector<Input> read_inputs(const std::string& folder);

}  // namespace lightning::fuzz
