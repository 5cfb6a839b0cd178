#include "lightning/checkpoint/checkpoint_search.h"

#include <algorithm>
#include <string_view>
#include <typeinfo>
#include <utility>
#include <vector>

#include "lightning/checkpoint/async_io.h"
#include "lightning/checkpoint/checkpoint_file.h"
#include "lightning/checkpoint/torch_file.h"
#include "lightning/errors.h"
#include "lightning/log.h"

namespace lightning {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kHpcBegin = "hpc_ckpt_", kHpcEnd = ".ckpt";
constexpr size_t kMostDigits = 18;  // of what fits in 64 bits

}  // namespace

bool can_look_into(CheckpointIO& io) {
  const auto* background = dynamic_cast<AsyncCheckpointIO*>(&io);
  const CheckpointIO& writer = background != nullptr ? background->wrapped() : io;
  static const auto own_io = default_checkpoint_io();
  const CheckpointIO& own = *own_io;
  return typeid(writer) == typeid(own);
}

FoundCheckpoint look_into(const std::string& path) {
  FoundCheckpoint found;
  found.path = path;
  std::error_code ignored;
  found.time = fs::last_write_time(path, ignored);
  const auto format = detect_format(path);
  found.resumable = format != CheckpointFormat::kSafetensors;
  if (format == CheckpointFormat::kSafetensors) return found;
  State state = State::dict();
  if (format == CheckpointFormat::kTorch) {
    state = read_torch_file(path, /*verify=*/false);
    found.resumable = state.contains("optimizer_states");
  } else {
    add_folder_values(state, path, /*verify=*/false);
  }
  if (const auto* step = state.find("global_step")) found.step = step->as_int();
  return found;
}

std::optional<FoundCheckpoint> newest_checkpoint(const std::set<std::string>& paths, bool look,
                                                 bool resumable, const FoundCheckpoint* after) {
  std::vector<FoundCheckpoint> found;
  std::vector<std::string> passed_over;
  for (const auto& path : paths) {
    std::error_code error;
    FoundCheckpoint one;
    one.path = path;
    one.time = fs::last_write_time(path, error);
    if (!error) {
      if (after == nullptr || one.time > after->time) found.push_back(std::move(one));
    } else if (fs::is_symlink(fs::symlink_status(path, error))) {
      passed_over.push_back(path + " (a link to a file that is not there)");
    }
  }
  std::stable_sort(found.begin(), found.end(),
                   [](const auto& a, const auto& b) { return a.time > b.time; });
  std::optional<FoundCheckpoint> newest;
  for (auto one = found.begin(); one != found.end() && !newest; ++one) {
    try {
      auto looked = look ? look_into(one->path) : *one;
      if (looked.resumable || !resumable) newest = std::move(looked);
    } catch (const CheckpointError& error) {
      passed_over.push_back(str(one->path, " (", error.what(), ")"));
    }
  }
  if (!passed_over.empty()) {
    warn("Passed over while looking for the last checkpoint: " + join(passed_over, "; "));
  }
  return newest;
}

std::map<int64_t, std::string> hpc_checkpoints(const std::string& folder) {
  std::map<int64_t, std::string> found;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(folder, ignored)) {
    const auto name = entry.path().filename().string();
    const size_t around = kHpcBegin.size() + kHpcEnd.size();
    if (name.size() <= around || name.compare(0, kHpcBegin.size(), kHpcBegin) != 0 ||
        name.compare(name.size() - kHpcEnd.size(), kHpcEnd.size(), kHpcEnd) != 0) {
      continue;
    }
    const auto digits = name.substr(kHpcBegin.size(), name.size() - around);
    const bool number = digits.find_first_not_of("0123456789") == std::string::npos;
    if (number && digits.size() <= kMostDigits) found[std::stoll(digits)] = entry.path().string();
  }
  return found;
}

std::string newest_hpc_checkpoint(const std::string& folder, bool look) {
  const auto found = hpc_checkpoints(folder);
  for (auto one = found.rbegin(); one != found.rend(); ++one) {
    try {
      if (look) look_into(one->second);
      return one->second;
    } catch (const CheckpointError& error) {
      warn(str("Passed over ", one->second, ": ", error.what()));
    }
  }
  return "";
}

std::string next_hpc_checkpoint(const std::string& folder) {
  const auto found = hpc_checkpoints(folder);
  const int64_t number = found.empty() ? 1 : found.rbegin()->first + 1;
  return (fs::path(folder) / str(kHpcBegin, number, kHpcEnd)).string();
}

}  // namespace lightning
