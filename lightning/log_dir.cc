#include "lightning/log_dir.h"

#include <algorithm>
#include <filesystem>
#include <utility>

#include "lightning/errors.h"
#include "lightning/files.h"

namespace lightning {
namespace {

namespace fs = std::filesystem;

// The N of "version_N" (or "version_N_anything", as the original counts), else -1.
int64_t version_number(const std::string& folder) {
  static const std::string kPrefix = "version_";
  if (folder.compare(0, kPrefix.size(), kPrefix) != 0) return -1;
  const auto digits =
      folder.substr(kPrefix.size(), folder.find('_', kPrefix.size()) - kPrefix.size());
  const bool number = !digits.empty() && digits.size() <= 18 &&
                      std::all_of(digits.begin(), digits.end(),
                                  [](unsigned char c) { return c >= '0' && c <= '9'; });
  return number ? std::stoll(digits) : -1;
}

}  // namespace

int64_t next_version(const std::string& root) {
  int64_t highest = -1;
  std::error_code error;
  if (!fs::is_directory(root, error)) return 0;
  fs::directory_iterator entry(root, error);
  for (; !error && entry != fs::directory_iterator(); entry.increment(error)) {
    std::error_code ignored;
    if (entry->is_directory(ignored)) {
      highest = std::max(highest, version_number(entry->path().filename().string()));
    }
  }
  if (error) {
    throw std::runtime_error(str("Cannot count the versions in ", root, ": ", error.message(),
                                 ". Give a version, or a save_dir that this user may read."));
  }
  return highest + 1;
}

LogDir::LogDir(std::optional<std::string> save_dir, std::optional<std::string> name,
               LogVersion version)
    : given_(save_dir.has_value()),
      save_dir_(save_dir.value_or(".")),
      name_(name.value_or("")),
      wanted_(std::move(version)) {
  if (!wanted_) return;
  const auto* number = std::get_if<int64_t>(&*wanted_);
  version_ = number != nullptr ? str("version_", *number) : std::get<std::string>(*wanted_);
  if (number != nullptr && *number < 0) {
    throw MisconfigurationError(str("A logger got version ", *number,
                                    ", expected 0 or more, a name, or none to count up."));
  }
}

void LogDir::set_default_root(const std::string& dir) {
  if (given_ || created_) return;
  if (!wanted_ && dir != save_dir_) version_.clear();  // it was counted elsewhere
  save_dir_ = dir;
}

const std::string& LogDir::version() const {
  if (version_.empty() && !wanted_) version_ = str("version_", next_version(root()));
  return version_;
}

std::string LogDir::root() const {
  return (fs::path(expand_path(save_dir_)) / expand_path(name_)).string();
}

std::string LogDir::path() const { return (fs::path(root()) / expand_path(version())).string(); }

void LogDir::create() {
  make_directories(path());
  created_ = true;
}

}  // namespace lightning
