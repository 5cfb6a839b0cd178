// Saves a checkpoint when an exception ends fit; the next fit without ckpt_path resumes from it.
//
// Registered as "OnExceptionCheckpoint". The file is deleted after a run that ends well.
// Source: Lightning 2.6, `OnExceptionCheckpoint`.
#pragma once

#include <set>
#include <string>

#include "lightning/checkpoint_callback.h"
#include "lightning/options.h"

namespace lightning {

struct OnExceptionCheckpointOptions : Options<OnExceptionCheckpointOptions> {
  OnExceptionCheckpointOptions() = default;
  explicit OnExceptionCheckpointOptions(std::string dirpath) { this->dirpath(std::move(dirpath)); }

  OPTION(std::string, dirpath, "", "Folder of the file. Must be given.");
  OPTION(std::string, filename, "on_exception", "Name of the file, without extension.");
};

class OnExceptionCheckpoint : public Checkpoint {
 public:
  // Errors: MisconfigurationError without dirpath or filename.
  explicit OnExceptionCheckpoint(OnExceptionCheckpointOptions options);

  std::string ckpt_path() const;

  std::set<std::string> last_checkpoints(Trainer&) const override { return {ckpt_path()}; }
  bool resumes_fit() const override { return true; }
  void on_exception(Trainer& trainer, LightningModule& module,
                    const std::exception& exception) override;
  void teardown(Trainer& trainer, LightningModule& module, Stage stage) override;

 private:
  OnExceptionCheckpointOptions options_;
};

}  // namespace lightning
