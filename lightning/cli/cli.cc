#include "lightning/cli/cli.h"

#include <torch/optim/optimizer.h>
#include <torch/version.h>

#include <csignal>
#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>

#include "lightning/checkpoint/checkpoint_file.h"
#include "lightning/checkpoint/state.h"
#include "lightning/cli/command_line.h"
#include "lightning/cli/config_tree.h"
#include "lightning/cli/help.h"
#include "lightning/cli/save_config.h"
#include "lightning/datamodule.h"
#include "lightning/escaped.h"
#include "lightning/files.h"
#include "lightning/hparams_state.h"
#include "lightning/log.h"
#include "lightning/logger.h"
#include "lightning/module.h"
#include "lightning/optim/factories.h"
#include "lightning/overrides.h"
#include "lightning/profiler.h"
#include "lightning/seed.h"
#include "lightning/strategy.h"
#include "lightning/version.h"

namespace lightning {
namespace {

using cli::ConfigTree;
using cli::Place;

// The keys of a configuration, beside those of the trainer, the model and the data.

struct SeedOptions : Options<SeedOptions> {
  OPTION(BoolOrInt, seed_everything, true,
         "Seed of all random numbers; true for that of PL_GLOBAL_SEED, else 0; false for none.");
};

struct ModelChoice : Options<ModelChoice> {
  OPTION(std::optional<Part<LightningModule>>, model, std::nullopt, "The model.");
};

struct DataChoice : Options<DataChoice> {
  OPTION(std::optional<Part<LightningDataModule>>, data, std::nullopt,
         "The data module. null: the model's own loaders.");
};

struct OptimizerChoice : Options<OptimizerChoice> {
  OPTION(std::optional<Part<OptimizerFactory>>, optimizer, std::nullopt,
         "The optimizer. null: what the model configures.");
  OPTION(std::optional<Part<LRSchedulerFactory>>, lr_scheduler, std::nullopt,
         "The schedule of its learning rate, a step for each epoch.");
};

constexpr const char* kCkptHelp =
    "A checkpoint: a file, \"best\" or \"last\". null: the model as it is made.";
constexpr const char* kWeightsHelp = "Always true here: a checkpoint never runs code.";

struct FitArguments : Options<FitArguments> {
  OPTION(std::optional<std::string>, ckpt_path, std::nullopt,
         "A checkpoint to go on from: a file, or \"last\". null: from the start.");
  OPTION(std::optional<bool>, weights_only, std::nullopt, kWeightsHelp);
  void fill(RunArguments&) const {}
};

struct EvaluateArguments : Options<EvaluateArguments> {
  OPTION(std::optional<std::string>, ckpt_path, std::nullopt, kCkptHelp);
  OPTION(bool, verbose, true, "Whether the table of results is printed.");
  OPTION(std::optional<bool>, weights_only, std::nullopt, kWeightsHelp);
  void fill(RunArguments& arguments) const { arguments.verbose(verbose()); }
};

struct PredictArguments : Options<PredictArguments> {
  OPTION(std::optional<bool>, return_predictions, std::nullopt,
         "Whether predictions are kept until the end. null: no, as nobody would take them.");
  OPTION(std::optional<std::string>, ckpt_path, std::nullopt, kCkptHelp);
  OPTION(std::optional<bool>, weights_only, std::nullopt, kWeightsHelp);
  void fill(RunArguments& arguments) const {
    arguments.return_predictions(return_predictions().value_or(false));
  }
};

template <class O>
RunArguments read_arguments(const Json& config) {
  O options;
  Json own = Json::object();
  for (const Field& field : O::fields()) own[field.name] = config.at(field.name);
  options.read(own, "");
  RunArguments arguments;
  arguments.ckpt_path(options.ckpt_path().value_or(""));
  if (!options.weights_only().value_or(true)) {
    throw MisconfigurationError(
        "weights_only=false asks to run code that a checkpoint holds, which is never done here. "
        "Leave it out.");
  }
  options.fill(arguments);
  return arguments;
}

template <class O>
void add_options(std::vector<Place>& places, Json& defaults, const O& options = {}) {
  for (auto& place : cli::places_of<O>()) places.push_back(std::move(place));
  Json values;
  options.write(values);
  defaults.update(values);
}

void add_group(std::vector<Place>& places, Json& defaults, const std::string& name,
               const std::string& help, std::vector<Place> inner, Json values) {
  Place group;
  group.name = name;
  group.help = help;
  group.kind = Place::Kind::kGroup;
  group.places = std::move(inner);
  places.push_back(std::move(group));
  defaults[name] = std::move(values);
}

// The options of a part that the program has fixed, or a choice among those that are registered.
template <class Kind, class Choice>
void add_part(std::vector<Place>& places, Json& defaults, const std::string& key,
              const std::string& fixed) {
  if (fixed.empty()) return add_options<Choice>(places, defaults);
  const auto& entry = registry<Kind>().entry(fixed);
  Json values;
  write_fields(*entry.fields, entry.default_options().get(), values);
  add_group(places, defaults, key, str(fixed, ": ", entry.help), cli::places_of(entry), values);
}

// Asking for a registry makes its kind known to the options that hold such parts.
void know_registries() {
  registry<LightningModule>();
  registry<LightningDataModule>();
  registry<OptimizerFactory>();
  registry<LRSchedulerFactory>();
}

void print_causes(const std::exception& error) {
  try {
    std::rethrow_if_nested(error);
  } catch (const std::exception& cause) {
    std::cerr << "caused by: " << escaped_lines(cause.what()) << "\n";
    print_causes(cause);
  } catch (...) {
  }
}

int failed(const std::exception& error) {
  std::cout.flush();
  // In one piece, for all ranks may end with it at once.
  std::cerr << "error: " + escaped_lines(error.what()) + "\n";
  print_causes(error);
  return 1;
}

}  // namespace

LightningCLI::LightningCLI(LightningCLIOptions options)
    : options_(std::move(options)), program_(std::make_unique<cli::Program>()) {
  program_->description = options_.description();
  program_->version = str(options_.version(), options_.version().empty() ? "" : " ",
                          "(Lightning for C++ ", kVersion, ", LibTorch ", TORCH_VERSION, ")");
  program_->config_header = str("# Lightning for C++ ", kVersion, "\n");
  program_->subcommands = {
      {"fit", "Trains the model: the full optimization routine."},
      {"validate", "One evaluation epoch over the validation set."},
      {"test", "One evaluation epoch over the test set."},
      {"predict", "Runs the model on data and writes or gives back what it predicts."}};
}

LightningCLI::~LightningCLI() = default;

int LightningCLI::run(int argc, char** argv) {
  return run(argc > 0 ? argv[0] : "program", std::vector<std::string>(argv + 1, argv + argc));
}

int LightningCLI::run(const std::string& program, const std::vector<std::string>& arguments) {
  program_->name = std::filesystem::path(program).filename().string();
  cli::CommandLine line(*program_, [this](const std::string& name) { return make_tree(name); });
  try {
    const cli::Request request = line.read(arguments);
    if (!request.output.empty()) {
      std::cout << request.output << std::flush;
      return 0;
    }
    subcommand_ = request.subcommand;
    apply_checkpoint_hparams(request);
    config_ = std::make_shared<Json>(request.tree->values());
    require_model();
    seed();
    before_instantiate_classes();
    instantiate_classes();
  } catch (const MisconfigurationError& error) {
    std::cout.flush();
    std::cerr << cli::usage(*program_, line.subcommand())
              << "tip: for all options run: " << program_->name
              << (line.subcommand().empty() ? "" : " ") << line.subcommand()
              << " --help\nerror: " << escaped_lines(error.what()) << std::endl;
    return 2;
  } catch (const std::exception& error) {
    return failed(error);
  }
  try {
    after_instantiate_classes();
    run_subcommand();
  } catch (const KeyboardInterrupt&) {  // the run has said so
    return 1;
  } catch (const SIGTERMException&) {
    return 128 + SIGTERM;
  } catch (const std::exception& error) {
    return failed(error);
  }
  return 0;
}

std::string LightningCLI::config_text() const {
  return program_->config_header + cli::write_config(*config_);
}

// ---- From words to a configuration --------------------------------------------------------------

ConfigTree LightningCLI::make_tree(const std::string& subcommand) const {
  std::vector<Place> places;
  Json defaults = Json::object();
  know_registries();
  add_options(places, defaults, SeedOptions().seed_everything(options_.seed_everything_default()));
  Json trainer;
  TrainerOptions(options_.trainer_defaults()).callbacks({}).write(trainer);
  add_group(places, defaults, "trainer", "The Trainer's flags.", cli::places_of<TrainerOptions>(),
            trainer);
  add_part<LightningModule, ModelChoice>(places, defaults, "model", options_.model());
  add_part<LightningDataModule, DataChoice>(places, defaults, "data", options_.data());
  if (options_.auto_configure_optimizers()) add_options<OptimizerChoice>(places, defaults);
  if (subcommand == "fit") {
    add_options<FitArguments>(places, defaults);
  } else if (subcommand == "predict") {
    add_options<PredictArguments>(places, defaults);
  } else {
    add_options<EvaluateArguments>(places, defaults);
  }
  return {std::move(places), defaults};
}

// The hyper-parameters of a checkpoint make the model that it fits, so they come before what the
// files say. What was written on the command line stays.
// Source: Lightning 2.6, `LightningCLI._parse_ckpt_path`, where the command line loses.
void LightningCLI::apply_checkpoint_hparams(const cli::Request& request) const {
  const Json ckpt = request.tree->values().at("ckpt_path");
  if (!ckpt.is_string()) return;
  const auto path = expand_path(ckpt.get<std::string>());
  if (!std::filesystem::exists(path)) return;  // "best", "last"; the trainer looks for others
  const State checkpoint = read_checkpoint_file(path, /*verify=*/false);
  const State* saved = checkpoint.find("hyper_parameters");
  if (saved == nullptr || !saved->is_dict()) return;
  Json hparams = hparams_from_state(*saved);
  hparams.erase("_instantiator");
  const std::string chosen = hparams.value("_class_path", "");
  hparams.erase("_class_path");
  if (hparams.empty()) return;
  Json model = hparams;
  if (options_.model().empty()) model = Json{{"init_args", hparams}};
  if (options_.model().empty() && !chosen.empty()) model["class_path"] = chosen;

  cli::ConfigSource source;
  source.name = path;
  source.value = std::make_shared<const Json>(Json{{"model", model}});
  request.tree->apply(source);
  for (const auto& [key, text] : request.options) {
    if (key.compare(0, 6, "model.") == 0) request.tree->set(key, text);
  }
}

void LightningCLI::require_model() const {
  if (!options_.model().empty() || !config_->at("model").is_null()) return;
  const auto names = registry<LightningModule>().names();
  throw MisconfigurationError(
      str("a model is required: --model NAME, or model: {class_path: NAME} in the configuration. ",
          names.empty() ? "No model is linked into this program; register one with "
                          "Registration<LightningModule>."
                        : str("Known: ", join(names), ".")));
}

void LightningCLI::seed() {
  Json& seed = config_->at("seed_everything");
  if (seed == false) return;
  seed = seed == true ? seed_everything(std::nullopt, true)
                      : seed_everything(seed.get<int64_t>(), true);
}

// ---- From a configuration to objects ------------------------------------------------------------

namespace {

// The part at a key: one that the program has fixed, the one that was chosen, or none.
template <class Kind>
std::shared_ptr<Kind> make_part(const Json& config, const std::string& key,
                                const std::string& fixed) {
  const Json& value = config.at(key);
  if (fixed.empty() && value.is_null()) return nullptr;
  const std::string name = fixed.empty() ? cli::part_name(value) : fixed;
  const bool flat = !fixed.empty() || !value.is_object();
  const Json& args = flat ? value : value.value("init_args", Json::object());
  const Json& options = args.is_object() ? args : empty_config();
  std::shared_ptr<Kind> part;
  try {
    part = registry<Kind>().make(name, options, key);
  } catch (const MisconfigurationError& error) {
    throw MisconfigurationError(str(key, ": ", error.what()));
  }
  if constexpr (std::is_same<Kind, LightningModule>::value ||
                std::is_same<Kind, LightningDataModule>::value) {
    if (part->hparams().empty() && !options.empty()) part->set_hparams(options);
  }
  return part;
}

}  // namespace

void LightningCLI::instantiate_classes() {
  datamodule_ = make_part<LightningDataModule>(*config_, "data", options_.data());
  model_ = make_part<LightningModule>(*config_, "model", options_.model());
  connect_optimizers();
  trainer_ = std::make_unique<Trainer>(trainer_options());
}

// The program's defaults, which may hold objects, with what the configuration changes.
TrainerOptions LightningCLI::trainer_options() const {
  TrainerOptions options = options_.trainer_defaults();
  const auto always = options.callbacks();
  options.callbacks({});
  Json defaults;
  options.write(defaults);
  const Json& flags = config_->at("trainer");
  Json changed = Json::object();
  for (const auto& [name, value] : flags.items()) {
    const Json& before = defaults.at(name);
    if (value != before || value.type() != before.type()) changed[name] = value;
  }
  options.read(changed, "trainer");

  auto callbacks = options.callbacks();
  callbacks.insert(callbacks.end(), always.begin(), always.end());
  const bool fast_dev_run = flags.at("fast_dev_run") != false && flags.at("fast_dev_run") != 0;
  if (options_.save_config() && !fast_dev_run) {
    callbacks.push_back(std::make_shared<SaveConfigCallback>(
        config_text(), options_.config_filename(), options_.overwrite_config()));
  }
  return options.callbacks(callbacks);
}

void LightningCLI::connect_optimizers() {
  if (!options_.auto_configure_optimizers()) return;
  if (config_->at("optimizer").is_null()) {
    if (config_->at("lr_scheduler").is_null()) return;
    throw MisconfigurationError(
        str("lr_scheduler got ", cli::part_name(config_->at("lr_scheduler")),
            ", but there is no optimizer for it to drive. Name one with --optimizer NAME, or make ",
            "both in configure_optimizers."));
  }
  const auto optimizer = make_part<OptimizerFactory>(*config_, "optimizer", "");
  const auto schedule = make_part<LRSchedulerFactory>(*config_, "lr_scheduler", "");
  const LightningModule& module = *model_;
  if (is_overridden(module, &LightningModule::configure_optimizers)) {
    warn(str("The optimizer of the configuration (", cli::part_name(config_->at("optimizer")),
             ") replaces what ", class_name(typeid(module)), "::configure_optimizers makes."));
  }
  model_->set_optimizer_factory([this, optimizer, schedule](LightningModule& module) {
    auto made = optimizer->make(module.parameters());
    auto driver = schedule == nullptr ? nullptr : schedule->make(made);
    return configure_optimizers(module, std::move(made), std::move(driver));
  });
}

Optimizers LightningCLI::configure_optimizers(LightningModule&,
                                              std::shared_ptr<torch::optim::Optimizer> optimizer,
                                              std::shared_ptr<LRScheduler> lr_scheduler) {
  if (lr_scheduler == nullptr) return Optimizers(std::move(optimizer));
  return Optimizers(std::move(optimizer), std::move(lr_scheduler));
}

// ---- Subcommands --------------------------------------------------------------------------------

void LightningCLI::run_subcommand() {
  if (subcommand_ == "fit") {
    before_fit();
    fit(read_arguments<FitArguments>(*config_));
    after_fit();
  } else if (subcommand_ == "validate") {
    before_validate();
    validate(read_arguments<EvaluateArguments>(*config_));
    after_validate();
  } else if (subcommand_ == "test") {
    before_test();
    test(read_arguments<EvaluateArguments>(*config_));
    after_test();
  } else {
    before_predict();
    predict(read_arguments<PredictArguments>(*config_));
    after_predict();
  }
}

void LightningCLI::fit(const RunArguments& arguments) {
  trainer_->fit(model_, datamodule_, arguments);
}
void LightningCLI::validate(const RunArguments& arguments) {
  trainer_->validate(model_, datamodule_, arguments);
}
void LightningCLI::test(const RunArguments& arguments) {
  trainer_->test(model_, datamodule_, arguments);
}
void LightningCLI::predict(const RunArguments& arguments) {
  trainer_->predict(model_, datamodule_, arguments);
}

}  // namespace lightning
