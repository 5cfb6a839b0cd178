#include "lightning/load_from_checkpoint.h"

#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>

#include "lightning/checkpoint/module_state.h"
#include "lightning/checkpoint/safetensors.h"
#include "lightning/checkpoint/torch_file.h"
#include "lightning/files.h"
#include "lightning/hparams_state.h"
#include "lightning/log.h"
#include "tests/support/temp_dir.h"

namespace lightning::testing {
namespace {

using Catch::Matchers::Contains;

// ---- What is loaded -----------------------------------------------------------------------------

struct OptimizerChoice : Options<OptimizerChoice> {
  OPTION(double, lr, 0.1, "Learning rate.");
  OPTION(bool, nesterov, false, "Kind of momentum.");
};

struct TinyOptions : Options<TinyOptions> {
  OPTION(int64_t, width, 2, "Outputs.");
  OPTION(double, dropout, 0.5, "Part of the outputs that is dropped.");
  OPTION(std::string, name, "tiny", "A text.");
  OPTION(OptimizerChoice, optimizer, {}, "Options in options.");
};

class Tiny : public LightningModule {
 public:
  explicit Tiny(const TinyOptions& options) : LightningModule(options), options(options) {
    layer = register_module("layer", torch::nn::Linear(3, options.width()));
  }
  void on_load_checkpoint(State& checkpoint) override {
    calls.push_back("on_load_checkpoint");
    checkpoint["state_dict"].as_dict().erase("left over");
  }
  void configure_model() override { calls.push_back("configure_model"); }

  TinyOptions options;
  torch::nn::Linear layer{nullptr};
  std::vector<std::string> calls;
};

class Lenient : public Tiny {
 public:
  explicit Lenient(const TinyOptions& options) : Tiny(options) { set_strict_loading(false); }
};

class Plain : public LightningModule {
 public:
  Plain() { layer = register_module("layer", torch::nn::Linear(3, 2)); }
  torch::nn::Linear layer{nullptr};
};

// Takes more than options, so that only a factory can build it.
class WithVocabulary : public Tiny {
 public:
  WithVocabulary(const TinyOptions& options, std::vector<std::string> words)
      : Tiny(options), words(std::move(words)) {}
  std::vector<std::string> words;
};

struct FolderOptions : Options<FolderOptions> {
  OPTION(std::string, folder, ".", "Where the files are.");
};

class Files : public LightningDataModule {
 public:
  explicit Files(const FolderOptions& options) : LightningDataModule(options) {}
  void load_state_dict(const State& state) override { position = state.at("position").as_int(); }
  int64_t position = -1;
};

const Registration<LightningModule> kTiny{
    "Tiny", "A linear layer.",
    [](const TinyOptions& options) { return std::make_shared<Tiny>(options); }};

// ---- What is in the file ------------------------------------------------------------------------

// All warnings while it lives.
class Warnings {
 public:
  Warnings() {
    before_ = set_log_sink([this](const std::string& line) { text += line + "\n"; });
  }
  ~Warnings() { set_log_sink(before_); }
  std::string text;

 private:
  LogSink before_;
};

State weights(int64_t width) {
  return State::dict({{"layer.weight", torch::arange(3.0 * width).reshape({width, 3})},
                      {"layer.bias", torch::ones({width})}});
}

struct Checkpoint {
  explicit Checkpoint(const Json& hparams, State state_dict = weights(5)) {
    state = State::dict({{"epoch", 1},
                         {"global_step", 10},
                         {"pytorch-lightning_version", "2.6.6"},
                         {"state_dict", std::move(state_dict)},
                         {"hparams_name", "kwargs"},
                         {"hyper_parameters", state_from_hparams(hparams)}});
  }
  std::string write() const {
    write_torch_file(state, path());
    return path();
  }
  std::string path() const { return dir.path("epoch=1.ckpt"); }

  TempDir dir;
  State state;
};

}  // namespace

TEST_CASE("load_from_checkpoint builds a module from its hyper-parameters and loads its weights",
          "[checkpoint]") {
  const Checkpoint file(Json{{"width", 5}, {"dropout", 0.25}, {"name", "five"}});
  const auto module = load_from_checkpoint<Tiny>(file.write());
  CHECK(module->options.width() == 5);
  CHECK(module->options.dropout() == 0.25);
  CHECK(module->hparams()["name"] == "five");
  CHECK(torch::equal(module->layer->weight, weights(5).at("layer.weight").as_tensor()));
  CHECK(module->layer->weight.requires_grad());
  CHECK(module->calls == std::vector<std::string>{"configure_model", "on_load_checkpoint"});
}

TEST_CASE("hyper-parameters of a file replace those of the checkpoint, single ones replace both",
          "[checkpoint]") {
  const Checkpoint file(Json{{"width", 5}, {"dropout", 0.25}, {"name", "saved"}});
  file.write();
  const auto check = [&](const std::string& hparams_file) {
    const auto module = load_from_checkpoint<Tiny>(
        file.path(), LoadOptions().hparams_file(hparams_file).hparam("dropout", 0));
    CHECK(module->options.width() == 5);
    CHECK(module->options.name() == "file");
    CHECK(module->options.dropout() == 0);
    CHECK(module->options.optimizer().lr() == 0.001);
  };
  write_file(file.dir.path("hparams.yaml"),
             "dropout: 0.75\nname: file\noptimizer:\n  lr: 1.0e-3\n  nesterov: true\n");
  check(file.dir.path("hparams.yaml"));
  write_file(file.dir.path("tags.csv"),
             "key,value\r\ndropout,0.75\r\nname,file\r\noptimizer,\"{'lr': 0.001, 'nesterov': "
             "true}\"\r\n");
  check(file.dir.path("tags.csv"));
  const auto module = load_from_checkpoint<Tiny>(
      file.path(), LoadOptions().hparam("name", "mine").hparam("optimizer.nesterov", true));
  CHECK(module->options.name() == "mine");
  CHECK(module->options.optimizer().nesterov());
}

TEST_CASE("hyper-parameters that a class does not have are left out with a warning",
          "[checkpoint]") {
  const Checkpoint file(
      Json{{"width", 5}, {"heads", 4}, {"optimizer", {{"lr", 0.5}, {"momentum", 0.9}}}});
  const Warnings warnings;
  const auto module = load_from_checkpoint<Tiny>(file.write());
  CHECK(module->options.optimizer().lr() == 0.5);
  CHECK_THAT(warnings.text, Contains("left out: heads, optimizer.momentum."));
}

TEST_CASE("a hyper-parameter of the wrong type is an error with its name and value",
          "[checkpoint]") {
  const Checkpoint file(Json{{"width", "five"}});
  file.write();
  CHECK_THROWS_WITH(load_from_checkpoint<Tiny>(file.path()),
                    Contains(file.path()) && Contains("width got \"five\", expected an integer") &&
                        Contains("hparam(name, value)"));
  CHECK_NOTHROW(load_from_checkpoint<Tiny>(file.path(), LoadOptions().hparam("width", 5)));
  CHECK_THROWS_AS(load_from_checkpoint<Tiny>(file.path()), MisconfigurationError);
}

TEST_CASE("a single hyper-parameter that the class does not have is an error", "[checkpoint]") {
  const Checkpoint file(Json{{"width", 5}});
  file.write();
  CHECK_THROWS_WITH(load_from_checkpoint<Tiny>(file.path(), LoadOptions().hparam("widht", 5)),
                    Contains("got \"widht\"") && Contains("Did you mean \"width\"?"));
  CHECK_THROWS_WITH(load_from_checkpoint<Tiny>(file.path(), LoadOptions().hparam("optimizer.l", 5)),
                    Contains("got \"l\""));
  CHECK_THROWS_WITH(load_from_checkpoint<Plain>(file.path(), LoadOptions().hparam("width", 5)),
                    Contains("\"width\"") && Contains("takes no hyper-parameters"));
}

TEST_CASE("a file of hyper-parameters that is missing or of another kind is an error",
          "[checkpoint]") {
  const Checkpoint file(Json{{"width", 5}});
  file.write();
  for (const char* name : {"none.yaml", "none.csv", "hparams.toml"}) {
    CHECK_THROWS_AS(
        load_from_checkpoint<Tiny>(file.path(), LoadOptions().hparams_file(file.dir.path(name))),
        MisconfigurationError);
  }
}

TEST_CASE("a checkpoint that does not fit lists every key with both shapes", "[checkpoint]") {
  State state = weights(5);
  state["layer.extra"] = torch::ones({2});
  state.as_dict().erase("layer.bias");
  const Checkpoint file(Json{{"width", 4}}, state);
  file.write();
  CHECK_THROWS_WITH(load_from_checkpoint<Tiny>(file.path()),
                    Contains("Cannot load " + file.path()) && Contains("layer.extra") &&
                        Contains("layer.bias") && Contains("[5, 3]") && Contains("[4, 3]"));
}

TEST_CASE("a load that is not strict names the keys that only one side has", "[checkpoint]") {
  State state = weights(2);
  state["other"] = torch::ones({2});
  state.as_dict().erase("layer.bias");
  const Checkpoint file(Json::object(), state);
  file.write();
  CHECK_THROWS_AS(load_from_checkpoint<Tiny>(file.path()), CheckpointError);
  const Warnings warnings;
  const auto module = load_from_checkpoint<Tiny>(file.path(), LoadOptions().strict(false));
  CHECK(torch::equal(module->layer->weight, weights(2).at("layer.weight").as_tensor()));
  CHECK_THAT(warnings.text, Contains("not in the checkpoint: layer.bias") &&
                                Contains("but in the checkpoint: other"));
  CHECK_NOTHROW(load_from_checkpoint<Lenient>(file.path()));  // by its own strict_loading()
}

TEST_CASE("strict against the module's own strict_loading is an error", "[checkpoint]") {
  const Checkpoint file(Json{{"width", 5}});
  CHECK_THROWS_WITH(load_from_checkpoint<Lenient>(file.write(), LoadOptions().strict(true)),
                    Contains("strict(true)") && Contains("set_strict_loading(false)"));
}

TEST_CASE("on_load_checkpoint may change what is loaded", "[checkpoint]") {
  State state = weights(5);
  state["left over"] = torch::ones({1});
  const Checkpoint file(Json{{"width", 5}}, state);
  CHECK_NOTHROW(load_from_checkpoint<Tiny>(file.write()));
}

TEST_CASE("a class without hyper-parameters is default-constructed", "[checkpoint]") {
  const Checkpoint file(Json{{"width", 7}}, weights(2));
  const Warnings warnings;
  const auto module = load_from_checkpoint<Plain>(file.write());
  CHECK(torch::equal(module->layer->bias, torch::ones({2})));
  CHECK_THAT(warnings.text, Contains("takes none") && Contains("width"));
}

TEST_CASE("a factory builds what a constructor of options alone cannot", "[checkpoint]") {
  const Checkpoint file(Json{{"width", 5}});
  file.write();
  const auto module = load_from_checkpoint<WithVocabulary>(
      file.path(), LoadOptions().hparam("dropout", 0.0), [](const TinyOptions& options) {
        return std::make_shared<WithVocabulary>(options, std::vector<std::string>{"a", "b"});
      });
  CHECK(module->words.size() == 2);
  CHECK(module->options.width() == 5);
  CHECK(module->options.dropout() == 0);
  load_from_checkpoint<Tiny>(file.path(), {}, [](const Json& hparams) {
    CHECK(hparams == Json{{"width", 5}});
    return std::make_shared<Tiny>(TinyOptions().width(hparams["width"]));
  });
  const Checkpoint plain(Json::object(), weights(2));
  load_from_checkpoint<Plain>(plain.write(), {}, [] { return std::make_shared<Plain>(); });
  CHECK_THROWS_WITH(load_from_checkpoint<WithVocabulary>(file.path()),
                    Contains("no constructor") && Contains("factory"));
}

TEST_CASE("a checkpoint that names a registered class builds that one", "[checkpoint]") {
  const Checkpoint file(Json{{"_class_path", "my_models.Tiny"},
                             {"_instantiator", "lightning.pytorch.cli.instantiate_module"},
                             {"width", 5}});
  file.write();
  const auto module = load_from_checkpoint<LightningModule>(file.path());
  const auto tiny = std::dynamic_pointer_cast<Tiny>(module);
  REQUIRE(tiny != nullptr);
  CHECK(tiny->options.width() == 5);
  CHECK_THROWS_WITH(load_from_checkpoint<Plain>(file.path()),
                    Contains("\"my_models.Tiny\"") && Contains("is no Plain"));
}

TEST_CASE("a checkpoint that names an unknown class builds what was asked for", "[checkpoint]") {
  const Checkpoint file(Json{{"_class_path", "my_models.Other"}, {"width", 5}});
  CHECK(load_from_checkpoint<Tiny>(file.write())->options.width() == 5);
  CHECK_THROWS_WITH(load_from_checkpoint<LightningModule>(file.path()),
                    Contains("\"my_models.Other\"") && Contains("not registered"));
}

TEST_CASE("hyper-parameters that Python's constructor took as one argument", "[checkpoint]") {
  Checkpoint file(Json{{"lr", 0.25}}, weights(2));
  file.state["hparams_name"] = "optimizer";
  CHECK(load_from_checkpoint<Tiny>(file.write())->options.optimizer().lr() == 0.25);
}

TEST_CASE("weights alone load too, as a state dict and as safetensors", "[checkpoint]") {
  const TempDir dir;
  const State state = weights(5);
  write_torch_file(state, dir.path("weights.pt"));
  SafetensorsContent content;
  for (const auto& [key, value] : state.as_dict()) {
    content.tensors.emplace_back(to_string(key), value.as_tensor());
  }
  write_safetensors(dir.path("weights.safetensors"), content);
  for (const char* name : {"weights.pt", "weights.safetensors"}) {
    INFO(name);
    const auto module =
        load_from_checkpoint<Tiny>(dir.path(name), LoadOptions().hparam("width", 5));
    CHECK(torch::equal(module->layer->weight, weights(5).at("layer.weight").as_tensor()));
  }
}

TEST_CASE("a state dict without parameters is worth a warning", "[checkpoint]") {
  struct Empty : LightningModule {};
  const Checkpoint file(Json::object(), State::dict());
  const Warnings warnings;
  load_from_checkpoint<Empty>(file.write());
  CHECK_THAT(warnings.text, Contains(file.path() + " contains no parameters"));
}

TEST_CASE("map_location says where the module goes, and is checked first", "[checkpoint]") {
  const Checkpoint file(Json{{"width", 5}});
  file.write();
  const auto on = [&](const std::string& device) {
    return load_from_checkpoint<Tiny>(file.path(), LoadOptions().map_location(device));
  };
  CHECK(on("cpu")->device().is_cpu());
  CHECK_THROWS_WITH(on("gpu0"), Contains("map_location got \"gpu0\""));
  CHECK_THROWS_WITH(on("cuda:99"), Contains("map_location got \"cuda:99\""));
}

TEST_CASE("a data module is built from its own hyper-parameters and gets its state",
          "[checkpoint]") {
  Checkpoint file(Json{{"width", 5}});
  file.state["datamodule_hparams_name"] = "kwargs";
  file.state["datamodule_hyper_parameters"] = State::dict({{"folder", "/data"}});
  CHECK(load_from_checkpoint<Files>(file.write())->position == -1);
  file.state["Files"] = State::dict({{"position", 17}});
  const auto files = load_from_checkpoint<Files>(file.write(), LoadOptions());
  CHECK(files->position == 17);
  CHECK(files->hparams() == Json{{"folder", "/data"}});
}

TEST_CASE("a file that is missing or no checkpoint is an error with its name", "[checkpoint]") {
  const TempDir dir;
  write_file(dir.path("notes.txt"), "These are notes.");
  for (const char* name : {"none.ckpt", "notes.txt"}) {
    CHECK_THROWS_WITH(load_from_checkpoint<Tiny>(dir.path(name)), Contains(dir.path(name)));
  }
}

}  // namespace lightning::testing
