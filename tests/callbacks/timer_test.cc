#include "callbacks/timer.h"

#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>

#include "lightning/checkpoint/state.h"
#include "lightning/log.h"
#include "lightning/registry.h"
#include "lightning/trainer.h"
#include "tests/support/boring.h"
#include "tests/support/temp_dir.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;

namespace {

// A module each of whose training steps takes one second of `now`.
std::shared_ptr<BoringModule> slow_module(double& now) {
  auto module = std::make_shared<BoringModule>();
  module->before_training_step = [&now](BoringModule&, int64_t) { now += 1; };
  return module;
}

}  // namespace

TEST_CASE("timer ends fit in the middle of an epoch when the time is up", "[callbacks]") {
  const TempDir dir;
  double now = 100;
  auto timer = std::make_shared<Timer>(TimerOptions("00:00:00:06"));
  timer->set_clock([&] { return now; });
  std::vector<std::string> lines;
  set_log_sink([&](const std::string& line) { lines.push_back(line); });
  Trainer trainer(quiet(dir).max_epochs(5).callbacks({timer}));

  trainer.fit(slow_module(now));
  set_log_sink(nullptr);

  CHECK(trainer.global_step() == 6);  // of 4 in an epoch
  CHECK(timer->time_elapsed() == 6);
  CHECK(timer->time_remaining() == 0.0);
  CHECK(timer->start_time() == 100.0);
  CHECK(timer->end_time() == 106.0);
  CHECK(std::count(lines.begin(), lines.end(),
                   "Time limit reached. Elapsed time is 0:00:06. Signaling Trainer to stop.") >= 1);
}

TEST_CASE("timer with interval epoch lets the epoch end", "[callbacks]") {
  const TempDir dir;
  double now = 0;
  auto timer = std::make_shared<Timer>(TimerOptions(std::map<std::string, int64_t>{{"seconds", 6}})
                                           .interval("epoch")
                                           .verbose(false));
  timer->set_clock([&] { return now; });
  Trainer trainer(quiet(dir).max_epochs(5).callbacks({timer}));

  trainer.fit(slow_module(now));

  CHECK(trainer.global_step() == 8);
}

TEST_CASE("timer measures a second fit anew", "[callbacks]") {
  const TempDir dir;
  double now = 0;
  auto timer = std::make_shared<Timer>(TimerOptions());
  timer->set_clock([&] { return now; });
  Trainer first(quiet(dir).max_epochs(1).callbacks({timer}));
  first.fit(slow_module(now));
  CHECK(timer->time_elapsed() == 4);
  CHECK(timer->time_remaining() == std::nullopt);

  Trainer second(quiet(dir).max_epochs(2).callbacks({timer}));
  second.fit(slow_module(now));
  CHECK(timer->time_elapsed() == 8);
}

TEST_CASE("timer counts the time before a checkpoint", "[callbacks]") {
  double now = 0;
  Timer before(TimerOptions("00:00:00:10"));
  before.set_clock([&] { return now; });
  State state = before.state_dict();
  std::vector<std::string> stages;
  for (const auto& item : state.at("time_elapsed").as_dict()) {
    stages.push_back(std::get<std::string>(item.first));
  }
  CHECK(stages == std::vector<std::string>{"train", "sanity_check", "validate", "test", "predict"});

  state["time_elapsed"]["train"] = 9.0;
  const TempDir dir;
  auto after = std::make_shared<Timer>(TimerOptions("00:00:00:10").verbose(false));
  after->set_clock([&] { return now; });
  after->load_state_dict(state);
  Trainer trainer(quiet(dir).max_epochs(5).callbacks({after}));
  trainer.fit(slow_module(now));
  CHECK(trainer.global_step() == 1);
}

TEST_CASE("timer refuses what it cannot read", "[callbacks]") {
  CHECK_THROWS_WITH(Timer(TimerOptions("1:30")),
                    "Timer got duration \"1:30\", expected DD:HH:MM:SS. For an hour and a half "
                    "write \"00:01:30:00\".");
  CHECK_THROWS_WITH(Timer(TimerOptions().interval("steps")),
                    Contains("got interval \"steps\"") && Contains("Did you mean \"step\"?"));
}

TEST_CASE("the flag max_time adds a timer", "[callbacks]") {
  const TempDir dir;
  Trainer trainer(quiet(dir).max_time(Duration("00:12:00:00")));
  REQUIRE(trainer.callbacks_of<Timer>().size() == 1);
  CHECK(trainer.callbacks_of<Timer>()[0]->time_remaining() == 12 * 3600.0);
}
