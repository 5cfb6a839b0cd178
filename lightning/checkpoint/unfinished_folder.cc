#include "lightning/checkpoint/unfinished_folder.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <optional>
#include <string_view>
#include <system_error>
#include <vector>

#include "lightning/checkpoint/checkpoint_file.h"
#include "lightning/files.h"

namespace lightning {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kEnd = ".unfinished";

bool ends_with(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

// A lock on the folder that has this name now; none where another holds it, or it cannot be had.
std::optional<Scope> lock_folder(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (fd < 0) return std::nullopt;
  Scope open = scope_exit([fd] { ::close(fd); });
  struct stat held {};
  struct stat named {};
  const bool is_ours = ::flock(fd, LOCK_EX | LOCK_NB) == 0 && ::fstat(fd, &held) == 0 &&
                       ::lstat(path.c_str(), &named) == 0 && named.st_ino == held.st_ino &&
                       named.st_dev == held.st_dev;
  if (!is_ours) return std::nullopt;
  return open;
}

// As they are named while or after they are written.
bool is_part(std::string_view name) {
  return name.substr(0, 9) == ".metadata" || name.substr(0, 7) == "meta.pt" ||
         (name.substr(0, 2) == "__" && name.find(".distcp") != std::string_view::npos);
}

bool has_parts_only(const std::string& path) {
  std::error_code failed;
  for (const auto& entry : fs::directory_iterator(path, failed)) {
    if (!entry.is_regular_file(failed) || !is_part(entry.path().filename().string())) return false;
  }
  return !failed;
}

}  // namespace

std::string unfinished_folder(const std::string& path) { return path + std::string(kEnd); }

Scope hold_folder(const std::string& path) {
  // remove_unfinished_folders() of another process may come in between.
  for (int attempt = 0; attempt < 3; ++attempt) {
    make_directories(path);
    if (const auto lock = lock_folder(path)) return *lock;
  }
  make_directories(path);
  return nullptr;
}

int64_t remove_unfinished_folders(const std::string& folder) {
  std::error_code failed;
  std::vector<std::string> left;
  for (const auto& entry : fs::directory_iterator(folder.empty() ? "." : folder, failed)) {
    if (ends_with(entry.path().filename().string(), kEnd)) left.push_back(entry.path().string());
  }
  int64_t removed = 0;
  for (const auto& path : left) {
    const auto lock = lock_folder(path);
    if (!lock || !has_parts_only(path)) continue;
    remove_checkpoint_file(path);
    ++removed;
  }
  return removed;
}

}  // namespace lightning
