#include "callbacks/on_exception_checkpoint.h"

#include <filesystem>

#include "lightning/errors.h"
#include "lightning/files.h"
#include "lightning/registry.h"
#include "lightning/strategy.h"
#include "lightning/trainer.h"

namespace lightning {
namespace {

const Registration<Callback> kOnExceptionCheckpoint{
    "OnExceptionCheckpoint", "Saves a checkpoint when an exception ends fit, to resume from.",
    [](const OnExceptionCheckpointOptions& options) {
      return std::make_unique<OnExceptionCheckpoint>(options);
    }};

}  // namespace

OnExceptionCheckpoint::OnExceptionCheckpoint(OnExceptionCheckpointOptions options)
    : options_(std::move(options)) {
  // An exception may come at any moment, also before a run knows its folders.
  if (options_.dirpath().empty()) {
    throw MisconfigurationError(
        "OnExceptionCheckpoint got no dirpath, expected a folder. Write dirpath(\".\") for the "
        "working directory.");
  }
  if (options_.filename().empty()) {
    throw MisconfigurationError(
        "OnExceptionCheckpoint got an empty filename, expected a name without extension. Leave it "
        "out for \"on_exception\".");
  }
}

std::string OnExceptionCheckpoint::ckpt_path() const {
  return (std::filesystem::path(expand_path(options_.dirpath())) / (options_.filename() + ".ckpt"))
      .string();
}

void OnExceptionCheckpoint::on_exception(Trainer& trainer, LightningModule&,
                                         const std::exception&) {
  trainer.save_checkpoint(ckpt_path());
}

void OnExceptionCheckpoint::teardown(Trainer& trainer, LightningModule&, Stage) {
  trainer.strategy().remove_checkpoint(ckpt_path());
}

}  // namespace lightning
