#include "tests/fuzz/input.h"

#include <dirent.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <optional>
#include <stdexcept>

namespace lightning::fuzz {
namespace {

std::optional<Format> format_of(const std::string& name) {
  const auto dot = name.rfind('.');
  const auto ending = dot == std::string::npos ? "" : name.substr(dot);
  if (ending == ".pt" || ending == ".ckpt") return Format::kTorchFile;
  if (ending == ".pickle") return Format::kPickle;
  if (ending == ".metadata") return Format::kDcpMetadata;
  if (ending == ".safetensors") return Format::kSafetensors;
  return std::nullopt;
}

}  // namespace

std::vector<Input> read_inputs(const std::string& folder) {
  std::vector<Input> inputs;
  DIR* const listing = ::opendir(folder.c_str());
  if (listing == nullptr) throw std::runtime_error("no folder " + folder);
  while (const dirent* entry = ::readdir(listing)) {
    const std::string name = entry->d_name;
    const auto format = format_of(name);
    if (!format) continue;
    std::ifstream file(folder + "/" + name, std::ios::binary);
    inputs.push_back({*format, name, {std::istreambuf_iterator<char>(file), {}}});
  }
  ::closedir(listing);
  if (inputs.empty()) throw std::runtime_error("no seeds in " + folder);
  std::sort(inputs.begin(), inputs.end(),
            [](const Input& a, const Input& b) { return a.name < b.name; });
  return inputs;
}

}  // namespace lightning::fuzz
