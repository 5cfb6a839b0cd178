#include "lightning/checkpoint/checkpoint_file.h"

#include <dirent.h>
#include <fcntl.h>
#include <ftw.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "lightning/checkpoint/dcp.h"
#include "lightning/checkpoint/mapped_file.h"
#include "lightning/checkpoint/safetensors.h"
#include "lightning/checkpoint/safetensors_header.h"
#include "lightning/checkpoint/torch_file.h"
#include "lightning/checkpoint/zip_reader.h"
#include "lightning/errors.h"

namespace lightning {
namespace {

constexpr const char* kFolderMetadata = ".metadata";

[[noreturn]] void refuse(const std::string& path, const std::string& reason) {
  throw CheckpointError(str("Cannot load the checkpoint ", path, ": ", reason));
}

bool exists(const std::string& path) {
  struct stat found {};
  return ::stat(path.c_str(), &found) == 0;
}

bool begins_with(std::string_view text, std::string_view begin) {
  return text.substr(0, begin.size()) == begin;
}

bool ends_with(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

std::vector<std::string> names_in(const std::string& folder) {
  std::vector<std::string> names;
  DIR* open = ::opendir(folder.c_str());
  if (open == nullptr) refuse(folder, str(std::strerror(errno), "."));
  while (const dirent* entry = ::readdir(open)) {
    const std::string name = entry->d_name;
    if (name != "." && name != "..") names.push_back(name);
  }
  ::closedir(open);
  std::sort(names.begin(), names.end());
  return names;
}

// ---- What lies there ----------------------------------------------------------------------------

CheckpointFormat detect_folder(const std::string& path) {
  if (exists(path + "/" + kFolderMetadata)) return CheckpointFormat::kSharded;
  const auto names = names_in(path);
  const bool is_sharded = std::any_of(names.begin(), names.end(), [](const auto& name) {
    return name == kFolderValues || ends_with(name, ".distcp") ||
           begins_with(name, kFolderMetadata);
  });
  if (is_sharded) {
    refuse(path,
           "it is a sharded checkpoint without its .metadata, which is written last: the save was "
           "not finished. Load an earlier one.");
  }
  if (names.empty()) refuse(path, "it is an empty folder. Give a checkpoint.");
  refuse(path, str("it is a folder that holds no sharded checkpoint (no .metadata, but ",
                   names.front(), names.size() > 1 ? ", ..." : "",
                   "). Give a checkpoint: a file, or a folder that torch.distributed.checkpoint "
                   "wrote."));
}

// The first bytes, at most `most`.
std::string beginning(const std::string& path, size_t most) {
  std::string bytes(most, '\0');
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  ssize_t got = -1;
  if (fd >= 0) {
    do {
      got = ::pread(fd, bytes.data(), most, 0);
    } while (got < 0 && errno == EINTR);
  }
  const int reason = errno;
  if (fd >= 0) ::close(fd);
  if (got < 0) refuse(path, str(std::strerror(reason), "."));
  bytes.resize(static_cast<size_t>(got));
  return bytes;
}

uint64_t number(std::string_view bytes, size_t at, size_t size) {
  uint64_t value = 0;
  for (size_t i = 0; i < size; ++i) {
    value |= uint64_t{static_cast<unsigned char>(bytes[at + i])} << (8 * i);
  }
  return value;
}

// Of a zip, by its first record where that is the pickle, as it is in what torch.save writes; else
// by its directory.
CheckpointFormat detect_zip(const std::string& path, std::string_view begin) {
  constexpr size_t kHeader = 30, kNameLength = 26;
  if (begin.size() > kHeader) {
    const auto name = begin.substr(kHeader, number(begin, kNameLength, 2));
    if (ends_with(name, "/data.pkl")) return CheckpointFormat::kTorch;
  }
  const ZipReader zip(MappedFile::open(path));
  if (zip.find("data.pkl") == nullptr) {
    refuse(path, str("it is a zip file of something else: it has no record data.pkl, but ",
                     zip.records().empty() ? "nothing" : zip.records().front().name,
                     ". Give what torch.save or a Trainer wrote."));
  }
  return CheckpointFormat::kTorch;
}

// Other files that people take for checkpoints, by how they begin.
const char* other_kind(std::string_view begin) {
  static constexpr struct {
    std::string_view begin;
    const char* what;
  } kKinds[] = {
      {std::string_view("\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19", 14),
       "it is a file of torch.save before torch 1.6 (a pickle, no zip), which this program does "
       "not read. Load it with Python and save it again."},
      {"version https://git-lfs",
       "it is a Git LFS pointer, not the file itself. Get the file with `git lfs pull`."},
      {"\x89HDF", "it is an HDF5 file. Give what torch.save, safetensors or a Trainer wrote."},
      {"GGUF", "it is a GGUF file. Give what torch.save, safetensors or a Trainer wrote."},
      {"\x1f\x8b", "it is compressed with gzip. Unpack it first."},
      {"\x28\xb5\x2f\xfd", "it is compressed with zstd. Unpack it first."},
      {"BZh", "it is compressed with bzip2. Unpack it first."},
      {"\xfd"
       "7zXZ",
       "it is compressed with xz. Unpack it first."},
      {"PK", "it is a zip file without records. Load an earlier one."},
      {"<", "it is a text that begins with \"<\", as a failed download does. Get it again."},
      {std::string_view("\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 16),
       "it begins with zeros: it was reserved and never written, or lost in a power cut. Load an "
       "earlier one."},
  };
  for (const auto& kind : kKinds) {
    if (begins_with(begin, kind.begin)) return kind.what;
  }
  const bool is_pickle = begin.size() > 1 && begin[0] == '\x80' && begin[1] >= 2 && begin[1] <= 5;
  return is_pickle ? "it is a plain pickle of Python's, not a file of torch.save. Load it with "
                     "Python and save it with torch.save."
                   : nullptr;
}

CheckpointFormat detect_file(const std::string& path) {
  const auto begin = beginning(path, 1024);
  if (begin.empty()) refuse(path, "it is empty: the save was not finished. Load an earlier one.");
  if (begins_with(begin, "PK\3\4")) return detect_zip(path, begin);
  if (begin.size() > 8 && begin[8] == '{' && number(begin, 0, 8) <= SafetensorsHeader::kMostBytes) {
    return CheckpointFormat::kSafetensors;
  }
  if (const char* other = other_kind(begin)) refuse(path, other);
  refuse(path,
         "it is of no format that is known here: a file of torch.save, safetensors, or a folder of "
         "torch.distributed.checkpoint. It may be torn; load an earlier one.");
}

// ---- A Trainer checkpoint of what was there -----------------------------------------------------

// Of an optimizer whose state goes by the names of the parameters, as sharded folders have it: by
// number, as a Trainer checkpoint has it. Numbers follow the order in the groups.
State by_number(const State& optimizer) {
  const auto* groups = optimizer.find("param_groups");
  const auto* states = optimizer.find("state");
  const bool is_known =
      groups != nullptr && groups->is<State::List>() && (states == nullptr || states->is_dict());
  if (!is_known) return optimizer;
  std::unordered_map<std::string, int64_t> numbers;
  State::List new_groups;
  int64_t next = 0;
  for (const auto& group : groups->as_list()) {
    const auto* names = group.find("params");
    if (names == nullptr || !(names->is<State::List>() || names->is<State::Tuple>())) {
      return optimizer;
    }
    State::List params;
    for (const auto& name : names->as_list()) {
      if (!name.is<std::string>()) return optimizer;  // numbers already
      const auto [place, added] = numbers.emplace(name.as_string(), next);
      next += added ? 1 : 0;
      params.emplace_back(place->second);
    }
    State renamed = group;
    renamed["params"] = std::move(params);
    new_groups.push_back(std::move(renamed));
  }
  std::vector<std::pair<int64_t, const State*>> ordered;
  if (states != nullptr) {
    for (const auto& [key, value] : states->as_dict()) {
      const auto* name = std::get_if<std::string>(&key);
      const auto number = name != nullptr ? numbers.find(*name) : numbers.end();
      if (number == numbers.end()) {
        throw CheckpointError(str("The optimizer's state is of a parameter ", to_string(key),
                                  " that is in none of its groups. The file is damaged or of "
                                  "another program."));
      }
      ordered.emplace_back(number->second, &value);
    }
  }
  std::sort(ordered.begin(), ordered.end(),
            [](const auto& a, const auto& b) { return a.first < b.first; });
  State::Dict new_states;
  for (const auto& [number, value] : ordered) new_states[number] = *value;
  State result = optimizer;
  result["state"] = std::move(new_states);
  result["param_groups"] = std::move(new_groups);
  return result;
}

// The number of "optimizer_3"; -1 for other keys.
int64_t optimizer_number(const State::Key& key) {
  static constexpr std::string_view kBegin = "optimizer_";
  const auto* text = std::get_if<std::string>(&key);
  if (text == nullptr || !begins_with(*text, kBegin)) return -1;
  const std::string digits = text->substr(kBegin.size());
  const bool is_number = !digits.empty() && digits.size() < 6 &&
                         digits.find_first_not_of("0123456789") == std::string::npos;
  return is_number ? std::stoll(digits) : -1;
}

State::List optimizers_of(const State& state) {
  std::vector<std::pair<int64_t, const State*>> found;
  for (const auto& [key, value] : state.as_dict()) {
    const int64_t number = optimizer_number(key);
    if (number >= 0 && value.is_dict()) found.emplace_back(number, &value);
  }
  std::sort(found.begin(), found.end(),
            [](const auto& a, const auto& b) { return a.first < b.first; });
  State::List optimizers;
  for (const auto& [number, value] : found) {
    if (number != static_cast<int64_t>(optimizers.size())) {
      throw CheckpointError(str("The checkpoint holds \"optimizer_", number,
                                "\" but no \"optimizer_", optimizers.size(),
                                "\". It is damaged or of another program."));
    }
    optimizers.push_back(by_number(*value));
  }
  return optimizers;
}

// Names with tensors, and perhaps what a module's get_extra_state gave.
bool is_state_dict(const State& state) {
  bool has_tensor = false;
  for (const auto& [key, value] : state.as_dict()) {
    if (!std::holds_alternative<std::string>(key)) return false;
    has_tensor |= value.is<TensorState>();
    const bool is_extra = ends_with(std::get<std::string>(key), "_extra_state");
    if (!value.is<TensorState>() && !is_extra) return false;
  }
  return has_tensor;
}

}  // namespace

const char* to_string(CheckpointFormat format) {
  switch (format) {
    case CheckpointFormat::kTorch:
      return "torch.save";
    case CheckpointFormat::kSafetensors:
      return "safetensors";
    case CheckpointFormat::kSharded:
      return "torch.distributed.checkpoint";
  }
  return "";
}

CheckpointFormat detect_format(const std::string& path) {
  struct stat found {};
  if (::stat(path.c_str(), &found) != 0) {
    refuse(path, str(std::strerror(errno),
                     ". Check the path; a relative one starts at the working directory."));
  }
  if (S_ISDIR(found.st_mode)) return detect_folder(path);
  if (!S_ISREG(found.st_mode))
    refuse(path, "it is neither a file nor a folder. Give a checkpoint.");
  return detect_file(path);
}

State read_checkpoint_file(const std::string& path, bool verify) {
  switch (detect_format(path)) {
    case CheckpointFormat::kTorch:
      return read_torch_file(path, verify);
    case CheckpointFormat::kSafetensors: {
      State state = State::ordered_dict();
      auto content = read_safetensors(path);
      state.as_dict().reserve(content.tensors.size());
      for (auto& [name, tensor] : content.tensors) state[name] = std::move(tensor);
      return state;
    }
    case CheckpointFormat::kSharded:
      break;
  }
  State state = DcpReader(path).read_all();
  add_folder_values(state, path, verify);
  return state;
}

void add_folder_values(State& state, const std::string& folder, bool verify) {
  const auto path = folder + "/" + kFolderValues;
  if (!exists(path)) return;
  const State values = read_torch_file(path, verify);
  if (!values.is_dict()) {
    refuse(path, str("it holds a ", values.type_name(),
                     ", expected a dict. Load an earlier checkpoint."));
  }
  if (state.is_none()) state = State::dict();
  for (const auto& [key, value] : values.as_dict()) state[key] = value;
}

State as_trainer_checkpoint(State state, CheckpointFormat format) {
  if (!state.is_dict()) {
    throw CheckpointError(str("The file holds a ", state.type_name(),
                              ", expected a dict: a Trainer checkpoint or a model's state dict."));
  }
  const auto is_dict_at = [&](const char* key) {
    const auto* value = state.find(key);
    return value != nullptr && value->is_dict();
  };
  if (format == CheckpointFormat::kSafetensors ||
      (!is_dict_at("state_dict") && is_state_dict(state))) {
    return State::dict({{"state_dict", std::move(state)}});
  }
  const bool has_model = !is_dict_at("state_dict") && is_dict_at("model");
  auto optimizers = optimizers_of(state);
  if (!has_model && optimizers.empty()) return state;
  if (!has_model && !is_dict_at("state_dict")) return state;  // of another program

  // In the order in which a Trainer writes the keys: counters, weights, the rest.
  static const std::vector<std::string> kFirst = {"epoch", "global_step",
                                                  "pytorch-lightning_version"};
  State result = State::dict();
  for (const auto& key : kFirst) {
    if (const auto* value = state.find(key)) result[key] = *value;
  }
  result["state_dict"] = state.at(has_model ? "model" : "state_dict");
  for (const auto& [key, value] : state.as_dict()) {
    const bool is_moved = optimizer_number(key) >= 0 && value.is_dict() && !optimizers.empty();
    const bool is_model = has_model && key == State::Key("model");
    if (!is_moved && !is_model && !result.contains(key)) result[key] = value;
  }
  if (!optimizers.empty()) result["optimizer_states"] = std::move(optimizers);
  return result;
}

// By nftw: LibTorch exports a copy of std::filesystem whose remove_all crashes in a program built
// with another libstdc++.
void remove_checkpoint_file(const std::string& path) {
  const auto fail = [&](int reason) {
    throw CheckpointError(str("Cannot remove the checkpoint ", path, ": ", std::strerror(reason),
                              ". Check the rights on it and on its folder."));
  };
  struct stat found {};
  if (::lstat(path.c_str(), &found) != 0) {
    if (errno == ENOENT) return;
    fail(errno);
  }
  if (!S_ISDIR(found.st_mode)) {
    if (::unlink(path.c_str()) != 0 && errno != ENOENT) fail(errno);
    return;
  }
  const auto metadata = path + "/" + kFolderMetadata;
  if (::unlink(metadata.c_str()) != 0 && errno != ENOENT && errno != EISDIR) fail(errno);
  const auto remove_one = [](const char* file, const struct stat*, int, FTW*) {
    return std::remove(file) == 0 || errno == ENOENT ? 0 : -1;
  };
  if (::nftw(path.c_str(), remove_one, 16, FTW_DEPTH | FTW_PHYS) != 0 && errno != ENOENT) {
    fail(errno);
  }
}

}  // namespace lightning
