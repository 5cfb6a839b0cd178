// A program that is configured by YAML and the command line:
//
//   int main(int argc, char** argv) { return lightning::LightningCLI().run(argc, argv); }
//
//   program fit --config config.yaml --trainer.max_epochs 3 --model.lr 1e-3
//
// Models and data modules are those that registered themselves (Registration<LightningModule>),
// chosen by `--model NAME` and `--data NAME`, or fixed by the program:
//
//   LightningCLI(LightningCLIOptions().model("Classifier").data("FashionMNIST")).run(argc, argv)
//
// Files and options are taken from left to right; everything is checked before any work starts.
// Source: Lightning 2.6, `LightningCLI`.
#pragma once

#include <torch/arg.h>

#include <memory>
#include <string>
#include <vector>

#include "lightning/fwd.h"
#include "lightning/optim/optimizers.h"
#include "lightning/options.h"
#include "lightning/trainer.h"
#include "lightning/trainer_options.h"

namespace lightning {

namespace cli {
class ConfigTree;
struct Program;
struct Request;
}  // namespace cli

class LightningCLIOptions {
 public:
  // The registered name of the program's model; its options then stand right under `model`. Empty:
  // any model, by class_path and init_args.
  TORCH_ARG(std::string, model);
  TORCH_ARG(std::string, data);
  // What applies where the configuration says nothing. Callbacks given here are always there,
  // after those of the configuration.
  TORCH_ARG(TrainerOptions, trainer_defaults);
  // true: PL_GLOBAL_SEED, else 0; a number: that; false: no seeding.
  TORCH_ARG(BoolOrInt, seed_everything_default) = true;
  // Whether `optimizer` and `lr_scheduler` may be chosen by the configuration.
  TORCH_ARG(bool, auto_configure_optimizers) = true;
  // Whether the configuration is saved in the log_dir, and how.
  TORCH_ARG(bool, save_config) = true;
  TORCH_ARG(std::string, config_filename) = "config.yaml";
  TORCH_ARG(bool, overwrite_config) = false;
  TORCH_ARG(std::string, description) = "Lightning Trainer command line tool";
  TORCH_ARG(std::string, version);  // of the program, for --version
};

class LightningCLI {
 public:
  explicit LightningCLI(LightningCLIOptions options = {});
  virtual ~LightningCLI();
  LightningCLI(const LightningCLI&) = delete;
  LightningCLI& operator=(const LightningCLI&) = delete;

  // Does what the arguments say. Gives the exit status: 0; 2 for arguments or a configuration that
  // make no sense, with a line "error: ..." on stderr, before any work; 1 for a run that failed.
  int run(int argc, char** argv);
  // `arguments` without the program's name.
  int run(const std::string& program, const std::vector<std::string>& arguments);

  // ---- From before_instantiate_classes() on -----------------------------------------------------

  const std::string& subcommand() const { return subcommand_; }  // "fit"
  // Every key with its value, as saved.
  const Json& config() const { return *config_; }
  // As YAML, with the line that says what wrote it.
  std::string config_text() const;

  // ---- From after_instantiate_classes() on ------------------------------------------------------

  Trainer& trainer() { return *trainer_; }
  const std::shared_ptr<LightningModule>& model() const { return model_; }
  const std::shared_ptr<LightningDataModule>& datamodule() const { return datamodule_; }  // or null

 protected:
  // Around the making of data module, model and trainer, and around each subcommand.
  virtual void before_instantiate_classes() {}
  virtual void after_instantiate_classes() {}
  virtual void before_fit() {}
  virtual void after_fit() {}
  virtual void before_validate() {}
  virtual void after_validate() {}
  virtual void before_test() {}
  virtual void after_test() {}
  virtual void before_predict() {}
  virtual void after_predict() {}

  // What the subcommands do: the trainer's methods.
  virtual void fit(const RunArguments& arguments);
  virtual void validate(const RunArguments& arguments);
  virtual void test(const RunArguments& arguments);
  virtual void predict(const RunArguments& arguments);

  // What `optimizer` and `lr_scheduler` of the configuration become; the schedule may be null.
  virtual Optimizers configure_optimizers(LightningModule& module,
                                          std::shared_ptr<torch::optim::Optimizer> optimizer,
                                          std::shared_ptr<LRScheduler> lr_scheduler);

 private:
  cli::ConfigTree make_tree(const std::string& subcommand) const;
  void apply_checkpoint_hparams(const cli::Request& request) const;
  void require_model() const;
  void seed();
  void instantiate_classes();
  TrainerOptions trainer_options() const;
  void connect_optimizers();
  void run_subcommand();

  LightningCLIOptions options_;
  std::unique_ptr<cli::Program> program_;
  std::string subcommand_;
  std::shared_ptr<Json> config_;
  std::shared_ptr<LightningDataModule> datamodule_;
  std::shared_ptr<LightningModule> model_;
  std::unique_ptr<Trainer> trainer_;
};

}  // namespace lightning
