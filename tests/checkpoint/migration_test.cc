#include "lightning/checkpoint/migration.h"

#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>

#include "lightning/errors.h"
#include "lightning/log.h"
#include "lightning/version.h"
#include "tests/support/python.h"

using Catch::Matchers::Contains;
using namespace lightning;
using lightning::testing::run_python;

namespace {

using Json = nlohmann::json;

State from_json(const Json& value) {
  if (value.is_null()) return {};
  if (value.is_boolean()) return value.get<bool>();
  if (value.is_number_float()) return value.get<double>();
  if (value.is_number()) return value.get<int64_t>();
  if (value.is_string()) return value.get<std::string>();
  if (value.is_array()) {
    State::List items;
    for (const auto& item : value) items.push_back(from_json(item));
    return items;
  }
  State state = State::dict();
  for (const auto& item : value.items()) state[item.key()] = from_json(item.value());
  return state;
}

Json to_json(const State& state) {
  if (state.is_none()) return nullptr;
  if (state.is<bool>()) return state.as_bool();
  if (state.is<int64_t>()) return state.as_int();
  if (state.is<double>()) return state.as_double();
  if (state.is<std::string>()) return state.as_string();
  if (!state.is_dict()) {
    Json items = Json::array();
    for (const auto& item : state.as_list()) items.push_back(to_json(item));
    return items;
  }
  Json items = Json::object();
  for (const auto& [key, value] : state.as_dict()) items[to_string(key)] = to_json(value);
  return items;
}

// The lines that were said while it lives.
class Said {
 public:
  Said() : before_(set_log_sink([this](const std::string& line) { lines += line + '\n'; })) {}
  ~Said() { set_log_sink(before_); }
  Said(const Said&) = delete;
  Said& operator=(const Said&) = delete;

  std::string lines;

 private:
  LogSink before_;
};

Json counts(int ready, int completed) { return {{"ready", ready}, {"completed", completed}}; }

// As Lightning 1.5 to 1.9 nested it.
Json old_fit_loop() {
  const Json progress = {{"current", counts(1, 1)}, {"total", counts(9, 9)}};
  return {{"state_dict", Json::object()},
          {"epoch_loop.state_dict", Json::object()},
          {"epoch_loop.batch_progress", {{"current", counts(2, 2)}, {"is_last_batch", true}}},
          {"epoch_loop.batch_loop.state_dict", {{"kept", 1}}},
          {"epoch_loop.batch_loop.manual_loop.state_dict", Json::object()},
          {"epoch_loop.batch_loop.manual_loop.optim_step_progress", progress},
          {"epoch_loop.batch_loop.optimizer_loop.state_dict", Json::object()},
          {"epoch_loop.batch_loop.optimizer_loop.optim_progress",
           {{"optimizer", {{"step", progress}}}, {"optimizer_position", 0}}},
          {"epoch_progress", {{"current", counts(3, 2)}, {"total", counts(3, 2)}}}};
}

Json evaluation_loop() {
  return {{"state_dict", Json::object()},
          {"dataloader_progress", {{"total", counts(1, 1)}}},
          {"epoch_loop.state_dict", {{"a", 1}}},
          {"epoch_loop.batch_progress", {{"total", counts(4, 4)}}}};
}

// Checkpoints of the ages of Lightning.
std::vector<Json> old_checkpoints() {
  const Json common = {{"epoch", 2},
                       {"global_step", 9},
                       {"state_dict", Json::object()},
                       {"optimizer_states", Json::array()},
                       {"lr_schedulers", Json::array()}};
  const auto with = [&](const char* version, Json more) {
    Json all = common;
    all["pytorch-lightning_version"] = version;
    all.update(more);
    return all;
  };
  const Json loops = {{"fit_loop", old_fit_loop()},
                      {"validate_loop", evaluation_loop()},
                      {"test_loop", evaluation_loop()},
                      {"predict_loop", evaluation_loop()}};
  Json renamed_loops = loops;
  renamed_loops["fit_loop"].erase("epoch_loop.batch_loop.state_dict");
  return {with("0.9.0", {{"checkpoint_callback_best_model_score", 0.5},
                         {"checkpoint_callback_best_model_path", "a.ckpt"},
                         {"early_stop_callback_wait", 1},
                         {"early_stop_callback_patience", 3}}),
          with("1.2.3", {{"callbacks", {{"EarlyStopping", {{"wait_count", 1}}}}}}),
          with("1.5.10", {{"loops", loops}}),
          with("1.6.0", {{"loops", loops}, {"amp_scaling_state", {{"scale", 1.0}}}}),
          with("1.8.6", {{"loops", renamed_loops},
                         {"callbacks",
                          {{"ModelCheckpoint{'monitor': 'x', 'mode': 'min', 'train_time_interval': "
                            "None, 'save_on_train_epoch_end': True}",
                            {{"dirpath", "d"}}},
                           {"Timer", {{"a", 1}}}}}}),
          with("1.8.6", {{"loops", loops},
                         {"callbacks",
                          {{"ModelCheckpoint{'a': 1, 'save_on_train_epoch_end': True}", 1},
                           {"ModelCheckpoint{'a': 1, 'save_on_train_epoch_end': None}", 2}}}}),
          with("2.0.0", {{"loops", Json::object()}}),
          with("2.6.6", {{"loops", Json::object()}})};
}

}  // namespace

TEST_CASE("checkpoints of every age of Lightning get the keys that the original gives them",
          "[checkpoint]") {
  const Json old = old_checkpoints();
  const auto expected = Json::parse(run_python(R"(
import json, sys, warnings
warnings.simplefilter("ignore")
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.migration.utils import migrate_checkpoint
def named(checkpoint):
    callbacks = checkpoint.get("callbacks")
    if callbacks is not None:
        checkpoint["callbacks"] = {k if isinstance(k, str) else k.__name__: v for k, v in callbacks.items()}
    return checkpoint
print(json.dumps([named(migrate_checkpoint(c)[0]) for c in json.loads(sys.argv[1])]))
)",
                                               {old.dump()}));
  REQUIRE(expected.size() == old.size());
  for (size_t i = 0; i < old.size(); ++i) {
    INFO(old[i].at("pytorch-lightning_version"));
    const Said said;
    State state = from_json(old[i]);
    migrate_checkpoint(state, "old.ckpt");
    CHECK(to_json(state) == expected[i]);
    CHECK(said.lines.empty() == (i >= 6));  // today's keys: nothing to tell
  }
}

TEST_CASE("a callback saved under its Python class comes under the name of the class",
          "[checkpoint]") {
  State::Object type;
  type.module = "pytorch_lightning.callbacks.early_stopping";
  type.name = "EarlyStopping";
  const State::OtherKey key{"<class>", std::make_shared<const State>(type)};
  State state = from_json(old_checkpoints()[1]);
  state["callbacks"] = State::dict({{key, State::dict({{"wait_count", 4}})}});
  const Said said;
  migrate_checkpoint(state, "old.ckpt");
  CHECK(state["callbacks"].at("EarlyStopping").at("wait_count").as_int() == 4);
  CHECK_THAT(said.lines, Contains("old.ckpt of Lightning 1.2.3"));
}

TEST_CASE("a checkpoint of a newer Lightning warns and stays as it is", "[checkpoint]") {
  const Json newer = {{"pytorch-lightning_version", "3.0.0rc1"}, {"global_step", 4}};
  State state = from_json(newer);
  const Said said;
  migrate_checkpoint(state, "new.ckpt");
  CHECK(to_json(state) == newer);
  CHECK_THAT(said.lines, Contains("new.ckpt") && Contains("3.0.0rc1") &&
                             Contains(std::string("newer than the ") + kPythonLightningVersion));
}

TEST_CASE("a checkpoint without the keys of a Trainer is loaded, and what is missing is said",
          "[checkpoint]") {
  const Said said;
  State state = from_json({{"pytorch-lightning_version", "1.4.0"}, {"optimizer_states", {}}});
  migrate_checkpoint(state, "a.ckpt");
  CHECK_THAT(said.lines, Contains("lacks \"global_step\", \"epoch\", \"state_dict\""));
  CHECK(state.at("loops")
            .at("fit_loop")
            .at("epoch_progress")
            .at("current")
            .at("completed")
            .as_int() == 0);
  // Values of other kinds where dicts are expected.
  for (const char* key : {"loops", "callbacks", "global_step", "epoch"}) {
    State odd = from_json(old_checkpoints()[2]);
    odd[key] = "text";
    CHECK_NOTHROW(migrate_checkpoint(odd, "a.ckpt"));
  }
  // A tree of weights, of another program: nothing is done to it.
  State weights = State::dict({{"state_dict", State::dict()}});
  migrate_checkpoint(weights, "a.ckpt");
  CHECK(to_json(weights) == Json{{"state_dict", Json::object()}});
}
