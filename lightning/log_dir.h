// Where a logger writes: save_dir/name/version, the version counted up from the folders there.
// Source: Lightning 2.6, `CSVLogger.log_dir`, `_get_next_version`.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>

#include "lightning/options.h"

namespace lightning {

// 3 is the folder "version_3", a string is the folder's own name; none counts up.
using LogVersion = std::optional<std::variant<int64_t, std::string>>;

// One more than the highest N of the folders "version_N" in `root`; 0 where there is none.
// Errors: std::runtime_error for a folder that cannot be read, with the reason.
int64_t next_version(const std::string& root);

// What the options of loggers that write there share.
template <class Derived>
struct LogDirOptions : Options<Derived> {
  using Self = Derived;
  OPTION(std::optional<std::string>, save_dir, std::nullopt,
         "Folder above the runs of all names. Not given: the trainer's default_root_dir.");
  OPTION(std::optional<std::string>, name, "lightning_logs",
         "Folder of this experiment's versions. null or \"\": the versions lie in save_dir.");
  OPTION(LogVersion, version, std::nullopt,
         "3 for the folder version_3, or a folder's name. Not given: one more than the highest.");
};

// "~" and "$NAME" in the parts are expanded in what is used, not in what save_dir() says.
class LogDir {
 public:
  // `save_dir` none: the folder that set_default_root gives, else the working directory.
  LogDir(std::optional<std::string> save_dir, std::optional<std::string> name, LogVersion version);

  // Does nothing where a save_dir was given, or once the folder was created.
  void set_default_root(const std::string& dir);

  const std::string& save_dir() const { return save_dir_; }
  const std::string& name() const { return name_; }
  // The folder's name, "version_3". A version that was not given is settled by the first call.
  const std::string& version() const;
  std::string path() const;  // save_dir/name/version

  // Creates the folder. Errors: std::runtime_error with path and reason.
  void create();

 private:
  std::string root() const;  // save_dir/name

  bool given_;
  bool created_ = false;
  std::string save_dir_;
  std::string name_;
  LogVersion wanted_;
  mutable std::string version_;  // empty until settled
};

}  // namespace lightning
