// Keeps the configuration of a run beside its logs.
// Source: Lightning 2.6, `SaveConfigCallback`.
#pragma once

#include <string>

#include "lightning/callback.h"

namespace lightning {

// Writes the configuration into the trainer's log_dir when the first run begins, on rank 0. Added
// by LightningCLI, after all other callbacks.
// Errors: std::runtime_error, on every rank, for a file that is already there.
class SaveConfigCallback : public Callback {
 public:
  //   config      the text of the file
  //   overwrite   replaces a file that is there
  SaveConfigCallback(std::string config, std::string filename = "config.yaml",
                     bool overwrite = false);

  void setup(Trainer& trainer, LightningModule& module, Stage stage) override;

  // For keeping it in other places too. Called on rank 0 only, so without collectives.
  virtual void save_config(Trainer&, LightningModule&, Stage) {}

 protected:
  const std::string& config() const { return config_; }

 private:
  std::string config_;
  std::string filename_;
  bool overwrite_;
  bool saved_ = false;
};

}  // namespace lightning
