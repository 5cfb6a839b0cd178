#include "lightning/cli/save_config.h"

#include <filesystem>

#include "lightning/files.h"
#include "lightning/strategy.h"
#include "lightning/trainer.h"

namespace lightning {

SaveConfigCallback::SaveConfigCallback(std::string config, std::string filename, bool overwrite)
    : config_(std::move(config)), filename_(std::move(filename)), overwrite_(overwrite) {}

void SaveConfigCallback::setup(Trainer& trainer, LightningModule& module, Stage stage) {
  if (saved_) return;
  saved_ = true;
  // Loggers settle their folder when first asked, so every rank asks.
  const std::string dir = trainer.log_dir();
  const std::string path = dir.empty() ? filename_ : dir + "/" + filename_;
  const bool exists = trainer.is_global_zero() && std::filesystem::is_regular_file(path);
  if (!overwrite_ && trainer.strategy().reduce_any(exists)) {
    throw std::runtime_error(str(
        "The configuration of this run would be saved as ", path,
        ", but that file is there, from an earlier run. Delete it, give the logger a new "
        "version, or set LightningCLIOptions().overwrite_config(true) or .save_config(false)."));
  }
  if (!trainer.is_global_zero()) return;
  if (!dir.empty()) make_directories(dir);
  write_file(path, config_);
  save_config(trainer, module, stage);
}

}  // namespace lightning
