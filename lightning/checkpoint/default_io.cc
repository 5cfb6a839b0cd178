#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "lightning/checkpoint/atomic_file.h"
#include "lightning/checkpoint/checkpoint_file.h"
#include "lightning/checkpoint/checkpoint_io.h"
#include "lightning/checkpoint/mapped_file.h"
#include "lightning/checkpoint/migration.h"
#include "lightning/checkpoint/torch_file.h"
#include "lightning/errors.h"
#include "lightning/files.h"

namespace lightning {
namespace {

[[noreturn]] void fail(const std::string& place, const std::string& target,
                       const std::string& why) {
  throw CheckpointError(str("Cannot make ", place, " lead to the checkpoint ", target, ": ", why));
}

std::string without_slashes(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return path;
}

// The names on the way from "/", without links; "." where there is nothing.
std::vector<std::string> steps_to(const std::string& path) {
  char* resolved = ::realpath(path.c_str(), nullptr);
  if (resolved == nullptr) {
    throw CheckpointError(str("Cannot find ", path, ": ", std::strerror(errno), "."));
  }
  const std::string whole = resolved;
  std::free(resolved);
  std::vector<std::string> steps;
  size_t begin = 1;
  while (begin < whole.size()) {
    const auto end = std::min(whole.find('/', begin), whole.size());
    steps.push_back(whole.substr(begin, end - begin));
    begin = end + 1;
  }
  return steps;
}

// The way to `target` from the folder in which `place` lies.
std::string relative_path(const std::string& target, const std::string& place) {
  auto to = steps_to(folder_of(target));
  to.push_back(target.substr(target.rfind('/') + 1));
  const auto from = steps_to(folder_of(place));
  size_t common = 0;
  while (common < from.size() && common + 1 < to.size() && from[common] == to[common]) ++common;
  std::vector<std::string> way(from.size() - common, "..");
  way.insert(way.end(), to.begin() + static_cast<std::ptrdiff_t>(common), to.end());
  return join(way, "/");
}

std::string beside(const std::string& place) {
  static std::atomic<uint64_t> count{0};
  return str(place, ".", ::getpid(), ".", count++, ".tmp");
}

void copy_file(const std::string& from, const std::string& to) {
  const auto file = MappedFile::open(from);
  AtomicFile copy(to, file->size());
  constexpr uint64_t kPiece = uint64_t{4} << 20;
  for (uint64_t at = 0; at < file->size(); at += kPiece) {
    copy.write(file->data() + at, std::min(kPiece, file->size() - at));
  }
  file->check();
  copy.commit();
}

bool is_folder(const std::string& path) {
  struct stat found {};
  return ::lstat(path.c_str(), &found) == 0 && S_ISDIR(found.st_mode);
}

std::vector<std::string> files_in(const std::string& folder) {
  dirent** entries = nullptr;
  const int count = ::scandir(folder.c_str(), &entries, nullptr, ::alphasort);
  if (count < 0)
    throw CheckpointError(str("Cannot read ", folder, ": ", std::strerror(errno), "."));
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) {
    names.emplace_back(entries[i]->d_name);
    std::free(entries[i]);
  }
  std::free(entries);
  names.erase(std::remove_if(names.begin(), names.end(),
                             [&](const auto& name) { return is_folder(folder + "/" + name); }),
              names.end());
  return names;
}

// A sharded checkpoint, `.metadata` last: the folder is a checkpoint once it is there.
void copy_folder(const std::string& from, const std::string& to) {
  make_directories(to);
  for (const auto& name : files_in(from)) {
    if (name != ".metadata") copy_file(from + "/" + name, to + "/" + name);
  }
  copy_file(from + "/.metadata", to + "/.metadata");
}

// Puts what lies at `from` in the place of `place`. Renaming replaces no folder, and nothing but an
// empty folder by a folder: what is there is moved aside first and removed when the new one is in
// its place.
void replace(const std::string& from, const std::string& place, const std::string& target) {
  std::string aside;
  if (is_folder(place) || (is_folder(from) && path_exists(place))) {
    aside = beside(place);
    if (::rename(place.c_str(), aside.c_str()) != 0) {
      fail(place, target, str(std::strerror(errno), ", while what is there was moved aside."));
    }
  }
  if (::rename(from.c_str(), place.c_str()) != 0) {
    const int reason = errno;
    if (!aside.empty()) ::rename(aside.c_str(), place.c_str());
    fail(place, target, str(std::strerror(reason), "."));
  }
  if (!aside.empty()) remove_checkpoint_file(aside);
  sync_folder(folder_of(place));  // as after a save
}

class TorchCheckpointIO : public CheckpointIO {
 public:
  void save(const State& checkpoint, const std::string& path) override {
    write_torch_file(checkpoint, path);
  }

  State load(const std::string& path) override {
    const auto format = detect_format(path);
    State state = read_checkpoint_file(path);
    try {
      state = as_trainer_checkpoint(std::move(state), format);
    } catch (const CheckpointError& error) {
      throw CheckpointError(str("Cannot load the checkpoint ", path, ": ", error.what()));
    }
    migrate_checkpoint(state, path);
    return state;
  }

  void remove(const std::string& path) override { remove_checkpoint_file(path); }
};

}  // namespace

// The new link is made beside its place and renamed, so that a reader finds the old one or the new.
void CheckpointIO::link(const std::string& target_path, const std::string& place_path) {
  const auto target = without_slashes(target_path);
  const auto place = without_slashes(place_path);
  struct stat found {
  }, there{};
  if (::stat(target.c_str(), &found) != 0) {
    fail(place, target, str(std::strerror(errno), ". Save it first."));
  }
  if (::lstat(place.c_str(), &there) == 0 && there.st_dev == found.st_dev &&
      there.st_ino == found.st_ino) {
    return;  // it is the checkpoint itself
  }
  make_directories(folder_of(place));
  const auto unfinished = beside(place);
  ::unlink(unfinished.c_str());
  if (::symlink(relative_path(target, place).c_str(), unfinished.c_str()) != 0) {
    const int reason = errno;
    if (reason != EPERM && reason != EOPNOTSUPP && reason != ENOSYS) {
      fail(place, target, str(std::strerror(reason), "."));
    }
    if (S_ISDIR(found.st_mode)) {
      copy_folder(target, unfinished);
    } else {
      copy_file(target, unfinished);
    }
  }
  try {
    replace(unfinished, place, target);
  } catch (...) {
    remove_checkpoint_file(unfinished);
    throw;
  }
}

std::shared_ptr<CheckpointIO> default_checkpoint_io() {
  return std::make_shared<TorchCheckpointIO>();
}

}  // namespace lightning
