// What the original decides is compared in parity_test.cc.
#include "callbacks/early_stopping.h"

#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>

#include "lightning/checkpoint/state.h"
#include "lightning/log.h"
#include "lightning/trainer.h"
#include "tests/support/boring.h"
#include "tests/support/temp_dir.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;

TEST_CASE("early stopping ends fit after `patience` checks without improvement", "[callbacks]") {
  const TempDir dir;
  auto module = std::make_shared<BoringModule>();
  module->val_losses = {1.0, 0.9, 0.9, 0.9, 0.5};  // logged as val_loss, one for each epoch
  auto early = std::make_shared<EarlyStopping>(EarlyStoppingOptions("val_loss").patience(2));
  Trainer trainer(quiet(dir).max_epochs(5).callbacks({early}));

  trainer.fit(module);

  CHECK(early->stopped_epoch() == 3);   // epochs count from 0
  CHECK(trainer.current_epoch() == 4);  // the fifth epoch never starts
  CHECK(early->stopping_reason() == EarlyStoppingReason::kPatienceExhausted);
  CHECK(early->stopping_reason_message() ==
        "Monitored metric val_loss did not improve in the last 2 records. Best score: 0.900. "
        "Signaling Trainer to stop.");
}

TEST_CASE("early stopping refuses options that make no sense and says what to write",
          "[callbacks]") {
  CHECK_THROWS_WITH(EarlyStopping(EarlyStoppingOptions("val_loss").patience(0)),
                    Contains("got patience 0") && Contains("patience(1)"));
  CHECK_THROWS_WITH(EarlyStopping(EarlyStoppingOptions("val_loss").min_delta(-1)),
                    Contains("got min_delta -1"));
  CHECK_THROWS_WITH(EarlyStopping(EarlyStoppingOptions("val_loss").mode("mix")),
                    Contains("got mode \"mix\"") && Contains("Did you mean \"min\""));
  CHECK_THROWS_WITH(EarlyStopping(EarlyStoppingOptions()), Contains("got no monitor"));
}

TEST_CASE("early stopping without its metric names those that were logged", "[callbacks]") {
  const TempDir dir;
  auto early = std::make_shared<EarlyStopping>(EarlyStoppingOptions("val_los"));
  Trainer trainer(quiet(dir).max_epochs(2).callbacks({early}));

  CHECK_THROWS_WITH(trainer.fit(std::make_shared<BoringModule>()),
                    Contains("no metric \"val_los\"") && Contains("Did you mean \"val_loss\"?") &&
                        Contains("Logged so far: train_loss, val_loss"));
}

TEST_CASE("early stopping tells of improvements when it is verbose", "[callbacks]") {
  const TempDir dir;
  std::vector<std::string> lines;
  set_log_sink([&](const std::string& line) { lines.push_back(line); });
  auto module = std::make_shared<BoringModule>();
  module->val_losses = {1.0, 0.75};
  auto early = std::make_shared<EarlyStopping>(
      EarlyStoppingOptions("val_loss").verbose(true).min_delta(0.1));
  Trainer(quiet(dir).max_epochs(2).callbacks({early})).fit(module);
  set_log_sink(nullptr);

  const auto has = [&](const std::string& line) {
    return std::count(lines.begin(), lines.end(), line) == 1;
  };
  CHECK(has("Metric val_loss improved. New best score: 1.000"));
  CHECK(has("Metric val_loss improved by 0.250 >= min_delta = 0.1. New best score: 0.750"));
}

TEST_CASE("early stopping goes on where a checkpoint left it, with Python's keys", "[callbacks]") {
  EarlyStopping before(EarlyStoppingOptions("val_loss").patience(7).mode("max"));
  CHECK(before.state_key() == "EarlyStopping{'monitor': 'val_loss', 'mode': 'max'}");
  State state = before.state_dict();
  std::vector<std::string> keys;
  for (const auto& item : state.as_dict()) keys.push_back(std::get<std::string>(item.first));
  CHECK(keys == std::vector<std::string>{"wait_count", "stopped_epoch", "best_score", "patience",
                                         "stopping_reason", "stopping_reason_message"});
  CHECK(state.at("best_score").as_tensor().scalar_type() == at::kFloat);
  CHECK(state.at("stopping_reason_message").is_none());

  state["wait_count"] = 3;
  state["best_score"] = at::scalar_tensor(0.5);
  state["stopping_reason"] = 1;
  EarlyStopping after(EarlyStoppingOptions("val_loss").patience(2));
  after.load_state_dict(state);
  CHECK(after.wait_count() == 3);
  CHECK(after.patience() == 7);  // the checkpoint's
  CHECK(after.best_score() == 0.5);
  CHECK(after.stopping_reason() == EarlyStoppingReason::kStoppingThreshold);
}

TEST_CASE("early stopping is made by its name from options", "[callbacks]") {
  const auto made = registry<Callback>().make(
      "EarlyStopping", Json{{"monitor", "acc"}, {"mode", "max"}, {"stopping_threshold", 1}});
  const auto& early = dynamic_cast<EarlyStopping&>(*made);
  CHECK(early.options().monitor() == "acc");
  CHECK(early.options().stopping_threshold() == 1.0);
  CHECK(early.role() == CallbackRole::kMonitor);
}
