#include "lightning/cli/cli.h"

#include <torch/optim/sgd.h>

#include <catch2/catch.hpp>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "callbacks/early_stopping.h"
#include "lightning/cli/config_source.h"
#include "lightning/datamodule.h"
#include "lightning/files.h"
#include "lightning/log.h"
#include "lightning/module.h"
#include "lightning/registry.h"
#include "tests/support/boring.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

namespace lightning {
namespace {

using Catch::Contains;
using Catch::StartsWith;
using testing::BoringModule;
using testing::TempDir;

struct NetOptions : Options<NetOptions> {
  OPTION(double, lr, 0.1, "The learning rate.");
  OPTION(int64_t, width, 3, "Not used.");
  OPTION(bool, fails, false, "Whether the first training step throws.");
};
struct Net : BoringModule {
  explicit Net(const NetOptions& options) : options(options) {
    before_training_step = [options](BoringModule&, int64_t) {
      if (options.fails()) throw std::runtime_error("the step failed");
    };
  }
  Optimizers configure_optimizers() override {
    return torch::optim::SGD(parameters(), options.lr());
  }
  NetOptions options;
};
struct OtherNet : BoringModule {};

struct RowsOptions : Options<RowsOptions> {
  OPTION(int64_t, rows, 8, "Rows to train on.");
};
struct Rows : LightningDataModule {
  explicit Rows(const RowsOptions& options) : LightningDataModule(options), options(options) {}
  Loaders train_dataloader() override { return testing::random_loader(options.rows()); }
  Loaders val_dataloader() override { return testing::random_loader(4); }
  Loaders test_dataloader() override { return testing::random_loader(4); }
  Loaders predict_dataloader() override { return testing::random_loader(4); }
  RowsOptions options;
};

const Registration<LightningModule> kNet{"Net", "A small net.", [](const NetOptions& options) {
                                           return std::make_shared<Net>(options);
                                         }};
const Registration<LightningModule> kOther{"OtherNet", "Another net.",
                                           [] { return std::make_shared<OtherNet>(); }};
const Registration<LightningDataModule> kRows{
    "Rows", "Random rows.",
    [](const RowsOptions& options) { return std::make_shared<Rows>(options); }};

// A command line tool whose output is kept, with its calls in order.
class Tool : public LightningCLI {
 public:
  explicit Tool(LightningCLIOptions options = LightningCLIOptions().model("Net").data("Rows"))
      : LightningCLI(std::move(options)) {}

  // Trains quietly in `dir` unless told otherwise.
  int operator()(const TempDir& dir, std::vector<std::string> arguments) {
    const std::vector<std::string> quiet = {"--trainer.default_root_dir=" + dir.path(),
                                            "--trainer.accelerator=cpu",
                                            "--trainer.enable_progress_bar=false",
                                            "--trainer.enable_model_summary=false",
                                            "--trainer.enable_checkpointing=false",
                                            "--trainer.logger=CSVLogger",
                                            "--trainer.max_epochs=1"};
    arguments.insert(arguments.begin() + 1, quiet.begin(), quiet.end());
    return (*this)(arguments);
  }
  int operator()(const std::vector<std::string>& arguments) {
    std::ostringstream out_text, err_text;
    auto* cout = std::cout.rdbuf(out_text.rdbuf());
    auto* cerr = std::cerr.rdbuf(err_text.rdbuf());
    set_log_sink([this](const std::string& line) { log += line + "\n"; });
    const int status = run("/somewhere/tool", arguments);
    set_log_sink(nullptr);
    std::cout.rdbuf(cout);
    std::cerr.rdbuf(cerr);
    out = out_text.str();
    err = err_text.str();
    return status;
  }

  std::string out, err, log;
  std::vector<std::string> calls;

 protected:
  void before_instantiate_classes() override { calls.push_back("before_instantiate_classes"); }
  void after_instantiate_classes() override { calls.push_back("after_instantiate_classes"); }
  void before_fit() override { calls.push_back("before_fit"); }
  void after_fit() override { calls.push_back("after_fit"); }
  void before_test() override { calls.push_back("before_test"); }
  void after_test() override { calls.push_back("after_test"); }
  void predict(const RunArguments& arguments) override {
    calls.push_back(arguments.return_predictions() ? "predict and keep" : "predict");
  }
};

TEST_CASE("fit trains what files and options describe, from left to right", "[cli]") {
  const TempDir dir;
  std::ofstream(dir.path("a.yaml")) << "model: {lr: 0.5, width: 7}\ndata:\n  rows: 6\n";
  std::ofstream(dir.path("b.json")) << R"({"model": {"width": 9}})";
  Tool tool;
  REQUIRE(tool(dir, {"fit", "--config", dir.path("a.yaml"), "--model.width", "8", "-c",
                     dir.path("b.json"), "--model.lr=1e-3", "--trainer.max_epochs", "2"}) == 0);
  const auto& net = dynamic_cast<const Net&>(*tool.model());
  CHECK(net.options.lr() == 1e-3);
  CHECK(net.options.width() == 9);
  CHECK(dynamic_cast<const Rows&>(*tool.datamodule()).options.rows() == 6);
  CHECK(tool.trainer().current_epoch() == 2);
  CHECK(tool.trainer().global_step() == 6);
  CHECK(tool.calls == std::vector<std::string>{"before_instantiate_classes",
                                               "after_instantiate_classes", "before_fit",
                                               "after_fit"});
}

TEST_CASE("the configuration is saved beside the logs, and makes the same run", "[cli]") {
  const TempDir dir;
  Tool tool;
  REQUIRE(tool(dir, {"fit", "--model.width=5", "--seed_everything=7"}) == 0);
  const std::string path = tool.trainer().log_dir() + "/config.yaml";
  CHECK_THAT(path, Contains("lightning_logs/version_0"));
  CHECK(read_file(path) == tool.config_text());
  CHECK_THAT(read_file(path),
             StartsWith("# Lightning for C++") && Contains("seed_everything: 7\n"));

  Tool again;
  REQUIRE(again({"fit", "--config", path}) == 0);
  CHECK(again.config() == tool.config());
  CHECK_THAT(again.trainer().log_dir(), Contains("version_1"));
}

TEST_CASE("a saved configuration is not replaced unless asked for", "[cli]") {
  const TempDir dir;
  const std::vector<std::string> fit = {"fit", "--trainer.logger.version=3"};
  REQUIRE(Tool()(dir, fit) == 0);
  Tool second;
  CHECK(second(dir, fit) == 1);
  CHECK_THAT(second.err, Contains("config.yaml") && Contains("overwrite_config(true)"));
  CHECK(Tool(LightningCLIOptions().model("Net").data("Rows").overwrite_config(true))(dir, fit) ==
        0);
  CHECK(Tool(LightningCLIOptions().model("Net").data("Rows").save_config(false))(dir, fit) == 0);
}

TEST_CASE("fast_dev_run leaves no configuration behind", "[cli]") {
  const TempDir dir;
  REQUIRE(Tool()(dir, {"fit", "--trainer.fast_dev_run=true"}) == 0);
  CHECK_FALSE(std::filesystem::exists(dir.path("lightning_logs")));
  CHECK_FALSE(std::filesystem::exists(dir.path("config.yaml")));
}

TEST_CASE("a printed configuration is a configuration that prints the same", "[cli]") {
  const TempDir dir;
  const std::string flags = GENERATE("", "=comments", "=skip_default", "=skip_null,skip_default");
  Tool tool;
  REQUIRE(tool({"fit", "--print_config" + flags, "--trainer.callbacks+=EarlyStopping",
                "--trainer.callbacks.monitor=val_loss", "--trainer.limit_val_batches=1",
                "--optimizer=AdamW", "--optimizer.lr=1e-3", "--trainer.max_time=00:10:00:00"}) ==
          0);
  CHECK(tool.calls.empty());
  CHECK_THAT(tool.out, Contains("max_time: 00:10:00:00") && Contains("limit_val_batches: 1\n"));
  CHECK((tool.out.find("# How many") == std::string::npos || flags == "=comments"));
  std::ofstream(dir.path("c.yaml")) << tool.out;
  Tool again;
  REQUIRE(again({"fit", "--config", dir.path("c.yaml"), "--print_config" + flags}) == 0);
  CHECK(again.out == tool.out);
}

TEST_CASE("a configuration that Python's command line prints is one here", "[cli]") {
  const std::string python = R"(
import sys
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
class Net(BoringModel):
    def __init__(self, lr: float = 0.1, width: int = 3):
        super().__init__()
class Rows(BoringDataModule):
    def __init__(self, rows: int = 8):
        super().__init__()
LightningCLI(Net, Rows, args=sys.argv[1:])
)";
  const std::vector<std::string> arguments = {"fit",
                                              "--print_config",
                                              "--trainer.callbacks+=EarlyStopping",
                                              "--trainer.callbacks.monitor=val_loss",
                                              "--trainer.callbacks+=LearningRateMonitor",
                                              "--trainer.logger=CSVLogger",
                                              "--trainer.logger.save_dir=logs",
                                              "--trainer.max_epochs=3",
                                              "--trainer.limit_val_batches=1.0",
                                              "--trainer.max_time=00:01:00:00",
                                              "--model.lr=1e-3",
                                              "--optimizer=SGD",
                                              "--optimizer.lr=1e-3",
                                              "--lr_scheduler=CosineAnnealingLR",
                                              "--lr_scheduler.T_max=3",
                                              "--data.rows=6"};
  std::string printed = testing::run_python(python, arguments);
  // There is no Lightning registry of models here.
  const std::string registry = "  model_registry: null\n";
  const size_t at = printed.find(registry);
  if (at != std::string::npos) printed.erase(at, registry.size());

  const TempDir dir;
  std::ofstream(dir.path("python.yaml")) << printed;
  Tool from_python;
  REQUIRE(from_python({"fit", "--config", dir.path("python.yaml"), "--print_config"}) == 0);
  Tool ours;
  REQUIRE(ours(arguments) == 0);
  CHECK(from_python.out == ours.out);
}

TEST_CASE("model and data are chosen by name where the program fixes none", "[cli]") {
  const TempDir dir;
  Tool tool(LightningCLIOptions{});
  REQUIRE(tool(dir, {"fit", "--model", "Net", "--model.lr", "0.25", "--data=Rows",
                     "--data.rows=4"}) == 0);
  CHECK(dynamic_cast<const Net&>(*tool.model()).options.lr() == 0.25);
  CHECK(tool.config()["model"]["class_path"] == "Net");
  REQUIRE(tool(dir, {"fit", "--model=some.module.OtherNet"}) == 0);
  CHECK(dynamic_cast<const OtherNet*>(tool.model().get()) != nullptr);
  CHECK(tool.datamodule() == nullptr);
  CHECK(tool({"fit"}) == 2);
  CHECK_THAT(tool.err, Contains("error: a model is required") && Contains("Net, OtherNet"));
}

TEST_CASE("hyper-parameters that a module does not keep itself come from the configuration",
          "[cli]") {
  const TempDir dir;
  Tool tool;
  REQUIRE(tool(dir, {"fit", "--model.width=4"}) == 0);
  CHECK(tool.model()->hparams()["width"] == 4);
  CHECK(tool.datamodule()->hparams()["rows"] == 8);
}

TEST_CASE("mistakes end the program with status 2 before any work, and say where they are",
          "[cli]") {
  const TempDir dir;
  std::ofstream(dir.path("bad.yaml")) << "model:\n  lr: 1e-3\n  wdith: 3\n";
  std::ofstream(dir.path("torn.yaml")) << "model:\n  lr: [1\n";
  std::ofstream(dir.path("twice.yaml")) << "model:\n  lr: 1\n  lr: 2\n";
  using Row = std::pair<std::vector<std::string>, std::string>;
  const std::vector<Row> rows = {
      Row{{}, "expected a subcommand"},
      Row{{"fitt"}, "Did you mean \"fit\"?"},
      Row{{"--model.lr=1", "fit"}, "after the subcommand"},
      Row{{"fit", "--config", dir.path("bad.yaml")}, "bad.yaml:3: model.wdith is not an option"},
      Row{{"fit", "--config", dir.path("torn.yaml")}, "torn.yaml:"},
      Row{{"fit", "--config", dir.path("twice.yaml")}, "twice.yaml:3 gives \"lr\" a second time"},
      Row{{"fit", "--config", dir.path("none.yaml")}, "none.yaml does not exist"},
      Row{{"--config", dir.path("bad.yaml"), "fit"}, "model is not a subcommand"},
      Row{{"fit", "--config"}, "expects the name of a file"},
      Row{{"fit", "--trainer.max_epoch=3"}, "Did you mean \"max_epochs\""},
      Row{{"fit", "--trainer.max_epochs=1.5"}, "trainer.max_epochs got 1.5, expected an integer"},
      Row{{"fit", "--trainer.max_epochs"}, "--trainer.max_epochs expects a value"},
      Row{{"fit", "--trainer.max_epoch"}, "Did you mean \"max_epochs\""},
      Row{{"fit", "stray"}, "unrecognized argument \"stray\""},
      Row{{"fit", "--trainer.callbacks+=EarlyStoping"}, "Did you mean \"EarlyStopping\"?"},
      Row{{"fit", "--trainer.callbacks.monitor=x"}, "--trainer.callbacks+=NAME"},
      Row{{"fit", "--trainer.accelerator=abacus"}, "abacus"},
      Row{{"fit", "--trainer.max_epochs=-2"}, "max_epochs"},
      Row{{"fit", "--lr_scheduler=StepLR"}, "--optimizer NAME"},
      {{"fit", "--optimizer=SGD", "--lr_scheduler=StepLR"},
       "lr_scheduler: StepLR got no step_size"},
      Row{{"fit", "--print_config=skip_nul"}, "Did you mean \"skip_null\"?"},
      Row{{"test", "--verbose=loud"}, "verbose got \"loud\", expected true or false"}};
  for (const auto& [arguments, message] : rows) {
    INFO(message);
    Tool tool;
    CHECK(tool(arguments) == 2);
    CHECK_THAT(tool.err, StartsWith("usage: tool") && Contains("\nerror: ") && Contains(message));
    CHECK(tool.out.empty());
    CHECK(std::count(tool.calls.begin(), tool.calls.end(), "after_instantiate_classes") == 0);
  }
}

TEST_CASE("a run that fails ends the program with status 1 and its reason", "[cli]") {
  const TempDir dir;
  Tool tool;
  CHECK(tool(dir, {"fit", "--model.fails=true"}) == 1);
  CHECK_THAT(tool.err, Contains("error: the step failed"));
  CHECK(std::count(tool.calls.begin(), tool.calls.end(), "after_fit") == 0);
}

TEST_CASE("the optimizer and its schedule may come from the command line", "[cli]") {
  const TempDir dir;
  Tool tool;
  REQUIRE(tool(dir, {"fit", "--trainer.max_epochs=3", "--optimizer", "SGD", "--optimizer.lr", "0.5",
                     "--lr_scheduler", "StepLR", "--lr_scheduler.step_size=1"}) == 0);
  auto& sgd = dynamic_cast<torch::optim::SGD&>(*tool.trainer().optimizers().at(0));
  // Tenfold less after each of the three epochs.
  CHECK(sgd.param_groups()[0].options().get_lr() == Approx(0.0005));
  CHECK_THAT(tool.log, Contains("Net::configure_optimizers"));
}

TEST_CASE("a section for each subcommand may stand in one file", "[cli]") {
  const TempDir dir;
  std::ofstream(dir.path("all.yaml")) << "fit:\n  model:\n    width: 5\ntest:\n  model:\n    "
                                         "width: 6\n  verbose: false\n";
  Tool tool;
  REQUIRE(tool({"--config", dir.path("all.yaml"), "test", "--print_config"}) == 0);
  CHECK_THAT(tool.out, Contains("width: 6") && Contains("verbose: false"));
  std::ofstream(dir.path("one.yaml")) << "fit:\n  modle: {}\n";
  CHECK(tool({"--config", dir.path("one.yaml")}) == 2);
  CHECK_THAT(tool.err, Contains("one.yaml:2: modle") && Contains("\"model\""));
}

TEST_CASE("a model is made as its checkpoint says, unless the command line says otherwise",
          "[cli]") {
  const TempDir dir;
  Tool fit;
  REQUIRE(fit(dir, {"fit", "--model.width=11", "--model.lr=0.2"}) == 0);
  const std::string ckpt = dir.path("net.ckpt");
  fit.trainer().save_checkpoint(ckpt);
  Tool test;
  REQUIRE(test(dir, {"test", "--ckpt_path", ckpt, "--model.lr=0.3"}) == 0);
  CHECK(test.model()->hparams()["width"] == 11);
  CHECK(test.model()->hparams()["lr"] == 0.3);
  CHECK(test.calls.back() == "after_test");
}

TEST_CASE("a method of the tool replaces the trainer's", "[cli]") {
  const TempDir dir;
  Tool tool;
  REQUIRE(tool(dir, {"predict"}) == 0);
  CHECK(tool.calls.back() == "predict");
  REQUIRE(tool(dir, {"predict", "--return_predictions=true"}) == 0);
  CHECK(tool.calls.back() == "predict and keep");
}

TEST_CASE("the program's defaults apply, and its callbacks are always there", "[cli]") {
  const TempDir dir;
  auto early = std::make_shared<EarlyStopping>(EarlyStoppingOptions("train_loss"));
  Tool tool(LightningCLIOptions().model("Net").seed_everything_default(3).trainer_defaults(
      TrainerOptions().callbacks({early}).accumulate_grad_batches(2)));
  REQUIRE(tool(dir, {"fit", "--trainer.callbacks+=LearningRateMonitor"}) == 0);
  CHECK(tool.trainer().accumulate_grad_batches() == 2);
  CHECK(tool.trainer().callbacks_of<EarlyStopping>() == std::vector<EarlyStopping*>{early.get()});
  CHECK(tool.config()["trainer"]["callbacks"].size() == 1);
  CHECK(tool.config()["seed_everything"] == 3);
}

TEST_CASE("the seed of the configuration makes the same weights", "[cli]") {
  const TempDir dir;
  const auto weights = [&](const std::string& seed) {
    Tool tool;
    REQUIRE(tool(dir, {"fit", "--seed_everything=" + seed, "--trainer.limit_train_batches=0"}) ==
            0);
    return tool.model()->parameters().at(0).clone();
  };
  CHECK(weights("1").equal(weights("1")));
  CHECK_FALSE(weights("1").equal(weights("2")));
}

TEST_CASE("help lists every option with type, default and what is known", "[cli]") {
  Tool tool;
  REQUIRE(tool({"--help"}) == 0);
  CHECK_THAT(tool.out,
             StartsWith("usage: tool [-h]") && Contains("  fit ") && Contains("  predict"));
  REQUIRE(tool({"--version"}) == 0);
  CHECK_THAT(tool.out, StartsWith("tool ") && Contains("LibTorch 2."));
  REQUIRE(tool({"fit", "-h"}) == 0);
  CHECK_THAT(tool.out,
             Contains("--trainer.max_epochs MAX_EPOCHS") && Contains("--model.width WIDTH"));
  for (const Field& flag : TrainerOptions::fields()) {
    CHECK_THAT(tool.out, Contains("--trainer." + flag.name + " "));
  }
  REQUIRE(tool({"fit", "--trainer.callbacks.help"}) == 0);
  CHECK_THAT(tool.out, Contains("EarlyStopping"));
  REQUIRE(tool({"fit", "--trainer.callbacks.help", "EarlyStopping"}) == 0);
  CHECK_THAT(tool.out, Contains("--trainer.callbacks.patience PATIENCE"));
  CHECK(tool({"fit", "--trainer.max_epochs.help"}) == 2);
  Tool any(LightningCLIOptions{});
  REQUIRE(any({"fit", "--model=Net", "--help"}) == 0);
  CHECK_THAT(any.out,
             Contains("--model NAME") && Contains("--model.lr LR") && Contains("--data.help"));
}

}  // namespace
}  // namespace lightning
