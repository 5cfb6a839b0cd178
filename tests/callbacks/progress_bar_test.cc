#include <fcntl.h>
#include <pty.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <chrono>
#include <regex>
#include <thread>

#include "callbacks/plain_progress_bar.h"
#include "callbacks/rich_progress_bar.h"
#include "callbacks/tqdm_progress_bar.h"
#include "lightning/errors.h"
#include "lightning/log.h"
#include "lightning/registry.h"
#include "lightning/trainer.h"
#include "tests/support/boring.h"
#include "tests/support/memory_logger.h"
#include "tests/support/screen.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;
using Catch::Matches;

namespace {

using Lines = std::vector<std::string>;

// Shows its loss on the bar, and lets a test look at the screen while it runs.
class ShownModule : public BoringModule {
 public:
  StepOutput training_step(const Batch& batch, int64_t batch_idx) override {
    if (before_training_step) before_training_step(*this, batch_idx);
    log("tl", 0.14100000262260437, LogOptions().prog_bar(true));
    return loss(batch);
  }
  using BoringModule::test_step;
  using BoringModule::validation_step;
  StepOutput validation_step(const Batch& batch, int64_t batch_idx, int64_t) override {
    if (in_validation_step) in_validation_step();
    return BoringModule::validation_step(batch, batch_idx);
  }
  StepOutput test_step(const Batch& batch, int64_t batch_idx, int64_t) override {
    return BoringModule::test_step(batch, batch_idx);
  }
  Loaders val_dataloader() override { return val_loaders; }
  Loaders test_dataloader() override { return val_loaders; }

  std::function<void()> in_validation_step;
  Loaders val_loaders = random_loader(4);
};

// A loader that does not know its length.
class Stream : public Loader {
 public:
  std::unique_ptr<LoaderIterator> iterate() override {
    struct Iterator : LoaderIterator {
      int left = 5;
      std::optional<Batch> next() override {
        if (left-- == 0) return std::nullopt;
        return Batch(at::ones({2, 32}));
      }
    };
    return std::make_unique<Iterator>();
  }
};

template <class Bar>
struct Shown {
  explicit Shown(std::shared_ptr<Bar> bar, std::shared_ptr<Screen> on = std::make_shared<Screen>())
      : bar(std::move(bar)), screen(std::move(on)) {
    this->bar->set_output(screen);
  }
  TrainerOptions options() {
    return quiet(dir).enable_progress_bar(true).callbacks({bar}).max_epochs(2).num_sanity_val_steps(
        0);
  }

  TempDir dir;
  std::shared_ptr<Bar> bar;
  std::shared_ptr<Screen> screen;
};

Shown<TQDMProgressBar> tqdm(const TQDMProgressBarOptions& options = {},
                            std::shared_ptr<Screen> screen = std::make_shared<Screen>()) {
  return Shown<TQDMProgressBar>(std::make_shared<TQDMProgressBar>(options), std::move(screen));
}

const std::string kTimes = "\\[[0-9:]+<[0-9:?]+, +[0-9.?]+it/s";

}  // namespace

TEST_CASE("one line serves all epochs and stays when fit is over", "[callbacks]") {
  auto shown = tqdm();
  Trainer trainer(shown.options());
  trainer.fit(std::make_shared<ShownModule>());

  const Lines lines = shown.screen->lines();
  REQUIRE(lines.size() == 1);
  CHECK_THAT(lines[0], Matches("Epoch 1: 100%\\|(█)+\\| 4/4 " + kTimes + ", tl=0.141\\]"));
  CHECK(display_width(lines[0]) == 99);  // as tqdm, all columns but the last
  CHECK(shown.screen->cursor_row() == 1);
  CHECK(shown.screen->cursor_column() == 0);
}

TEST_CASE("the logger's version stands before the metrics", "[callbacks]") {
  auto shown = tqdm();
  Trainer trainer(shown.options().logger(std::make_shared<MemoryLogger>()));
  trainer.fit(std::make_shared<ShownModule>());
  CHECK_THAT(shown.screen->lines()[0], Contains("it/s, v_num=0, tl=0.141]"));
}

TEST_CASE("leave keeps a line for each epoch", "[callbacks]") {
  auto shown = tqdm(TQDMProgressBarOptions().leave(true));
  Trainer trainer(shown.options().max_epochs(3));
  trainer.fit(std::make_shared<ShownModule>());

  const Lines lines = shown.screen->lines();
  REQUIRE(lines.size() == 3);
  for (int epoch = 0; epoch < 3; ++epoch) {
    CHECK_THAT(lines[epoch], Contains(str("Epoch ", epoch, ": 100%")) && Contains("4/4"));
  }
}

TEST_CASE("validation has a line below the epoch's while it runs", "[callbacks]") {
  auto shown = tqdm();
  auto module = std::make_shared<ShownModule>();
  module->val_loaders = std::vector<Loaders>{random_loader(4), random_loader(4)};
  std::vector<Lines> seen;
  module->in_validation_step = [&] { seen.push_back(shown.screen->lines()); };
  Trainer trainer(shown.options().max_epochs(1));
  trainer.fit(module);

  REQUIRE(seen.size() == 4);
  REQUIRE(seen[0].size() == 2);
  CHECK_THAT(seen[0][0], Contains("Epoch 0: 100%"));
  CHECK_THAT(seen[0][1], Contains("Validation DataLoader 0:   0%|") && Contains("0/2"));
  CHECK_THAT(seen[2][1], Contains("Validation DataLoader 1:   0%|"));
  CHECK(shown.screen->lines().size() == 1);
}

TEST_CASE("the sanity check shows a bar and takes it away", "[callbacks]") {
  auto shown = tqdm();
  auto module = std::make_shared<ShownModule>();
  Lines seen;
  module->in_validation_step = [&] {
    if (seen.empty()) seen = shown.screen->lines();
  };
  Trainer trainer(shown.options().num_sanity_val_steps(2));
  trainer.fit(module);
  REQUIRE(seen.size() == 1);
  CHECK_THAT(seen[0], Contains("Sanity Checking DataLoader 0:   0%|"));
  CHECK(shown.screen->lines().size() == 1);
}

TEST_CASE("validate, test and predict leave a bar each", "[callbacks]") {
  auto shown = tqdm();
  auto module = std::make_shared<ShownModule>();
  Trainer trainer(shown.options());
  trainer.validate(module, Loaders(), RunArguments().verbose(false));
  trainer.test(module, Loaders(), RunArguments().verbose(false));
  trainer.predict(module);
  const Lines lines = shown.screen->lines();
  REQUIRE(lines.size() == 3);
  CHECK_THAT(lines[0], Contains("Validation DataLoader 0: 100%") && Contains("2/2"));
  CHECK_THAT(lines[1], Contains("Testing DataLoader 0: 100%"));
  CHECK_THAT(lines[2], Contains("Predicting DataLoader 0: 100%"));
}

TEST_CASE("an unknown length shows as a question mark", "[callbacks]") {
  for (const bool terminal : {true, false}) {
    auto shown = tqdm({}, std::make_shared<Screen>(100, terminal));
    Trainer trainer(shown.options().max_epochs(1).limit_val_batches(int64_t{0}));
    trainer.fit(std::make_shared<ShownModule>(), std::make_shared<Stream>());
    // The loop knows the length once it has seen the end.
    CHECK_THAT(shown.screen->lines().back(), Contains("Epoch 0: ") && Contains("5/"));
  }
}

TEST_CASE("lines printed meanwhile stand above the bar", "[callbacks]") {
  auto shown = tqdm();
  auto module = std::make_shared<ShownModule>();
  module->before_training_step = [](BoringModule& self, int64_t batch_idx) {
    self.print("batch ", batch_idx);
  };
  Trainer trainer(shown.options().max_epochs(1));
  trainer.fit(module);
  const Lines lines = shown.screen->lines();
  REQUIRE(lines.size() == 5);
  for (int i = 0; i < 4; ++i) CHECK(lines[i] == str("batch ", i));
  CHECK_THAT(lines[4], Contains("Epoch 0: 100%"));
}

TEST_CASE("where there is no terminal, a log gets one readable line an epoch", "[callbacks]") {
  for (const char* name : {"TQDMProgressBar", "RichProgressBar", "PlainProgressBar"}) {
    INFO(name);
    auto bar = std::dynamic_pointer_cast<LiveProgressBar>(registry<Callback>().make(name));
    REQUIRE(bar != nullptr);
    Shown<LiveProgressBar> shown(bar, std::make_shared<Screen>(0, /*terminal=*/false));
    auto module = std::make_shared<ShownModule>();
    module->before_training_step = [](BoringModule& self, int64_t batch_idx) {
      if (batch_idx == 1) self.print("hello");
    };
    Trainer trainer(shown.options().num_sanity_val_steps(1));
    trainer.fit(module);
    trainer.test(module, Loaders(), RunArguments().verbose(false));

    CHECK_THAT(shown.screen->bytes(), !Contains("\r") && !Contains("\x1b"));
    const Lines lines = shown.screen->lines();
    REQUIRE(lines.size() == 5);
    CHECK(lines[0] == "hello");
    CHECK_THAT(lines[1], Matches("Epoch 0(/1)?: 100% 4/4 " + kTimes + ", tl=0.141\\]"));
    CHECK_THAT(lines[3], Matches("Epoch 1(/1)?: 100% 4/4 " + kTimes + ", tl=0.141\\]"));
    CHECK_THAT(lines[4], Matches("Testing.*: 100% 2/2 " + kTimes + "\\]"));
  }
}

TEST_CASE("lines come at intervals within a long epoch", "[callbacks]") {
  Shown<PlainProgressBar> shown(
      std::make_shared<PlainProgressBar>(PlainProgressBarOptions().interval(0.02)));
  auto module = std::make_shared<ShownModule>();
  module->before_training_step = [](BoringModule&, int64_t) {
    std::this_thread::sleep_for(std::chrono::milliseconds(25));
  };
  Trainer trainer(shown.options().max_epochs(1));
  trainer.fit(module);
  const Lines lines = shown.screen->lines();
  REQUIRE(lines.size() >= 4);
  CHECK_THAT(lines[0], Contains("Epoch 0:  25% 1/4"));
  CHECK_THAT(lines.back(), Contains("Epoch 0: 100% 4/4"));
  CHECK_THAT(shown.screen->bytes(), !Contains("\r"));
}

TEST_CASE("a bar that is off writes nothing", "[callbacks]") {
  auto shown = tqdm(TQDMProgressBarOptions().refresh_rate(0));
  Trainer trainer(shown.options());
  trainer.fit(std::make_shared<ShownModule>());
  CHECK(shown.screen->bytes().empty());
}

TEST_CASE("fast batches are not drawn one by one", "[callbacks]") {
  auto shown = tqdm();
  Trainer trainer(shown.options().max_epochs(1).limit_val_batches(int64_t{0}));
  const auto start = std::chrono::steady_clock::now();
  trainer.fit(std::make_shared<ShownModule>(), random_loader(2000, 2));
  const double took =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  // Ten a second, and those at the start and the end of the run, the epoch and the bar.
  CHECK(static_cast<double>(shown.screen->writes().size()) < 10 * took + 8);
}

TEST_CASE("refresh_rate counts batches", "[callbacks]") {
  auto shown = tqdm(TQDMProgressBarOptions().refresh_rate(3));
  auto module = std::make_shared<ShownModule>();
  module->before_training_step = [](BoringModule&, int64_t) {
    std::this_thread::sleep_for(std::chrono::milliseconds(110));
  };
  Trainer trainer(shown.options().max_epochs(1).limit_val_batches(int64_t{0}));
  trainer.fit(module);
  CHECK_THAT(shown.screen->bytes(), !Contains(" 1/4") && !Contains(" 2/4") && Contains(" 3/4"));
}

TEST_CASE("an exception leaves the bar where it was and the cursor below it", "[callbacks]") {
  auto shown = tqdm();
  auto module = std::make_shared<ShownModule>();
  module->before_training_step = [](BoringModule&, int64_t batch_idx) {
    if (batch_idx == 2) throw std::runtime_error("no more");
  };
  Trainer trainer(shown.options());
  CHECK_THROWS_WITH(trainer.fit(module), "no more");
  const Lines lines = shown.screen->lines();
  REQUIRE(lines.size() == 1);
  CHECK_THAT(lines[0], Contains("Epoch 0:  50%") && Contains("2/4"));
  CHECK(shown.screen->cursor_row() == 1);
}

TEST_CASE("process_position draws further down", "[callbacks]") {
  auto shown = tqdm(TQDMProgressBarOptions().process_position(1));
  auto module = std::make_shared<ShownModule>();
  Lines seen;
  module->in_validation_step = [&] { seen = shown.screen->lines(); };
  Trainer trainer(shown.options().max_epochs(1));
  trainer.fit(module);
  REQUIRE(seen.size() == 4);
  CHECK(seen[0].empty());
  CHECK(seen[1].empty());
  CHECK_THAT(seen[2], Contains("Epoch 0: 100%"));
  CHECK_THAT(seen[3], Contains("Validation DataLoader 0"));
}

TEST_CASE("the bar follows the width of the window", "[callbacks]") {
  int master = -1, slave = -1;
  winsize size{24, 60, 0, 0};
  REQUIRE(openpty(&master, &slave, nullptr, nullptr, &size) == 0);
  setenv("TERM", "xterm", 1);
  fcntl(master, F_SETFL, O_NONBLOCK);
  const auto drawn = [&] {
    std::string bytes(65536, '\0');
    const auto count = read(master, &bytes[0], bytes.size());
    bytes.resize(static_cast<size_t>(std::max<ssize_t>(0, count)));
    Screen screen(200);
    screen.write(bytes);
    return screen.lines();
  };

  TempDir dir;
  auto bar = std::make_shared<TQDMProgressBar>();
  bar->set_output(std::make_shared<FileOutput>(slave));
  auto module = std::make_shared<ShownModule>();
  std::vector<Lines> seen;
  module->before_training_step = [&](BoringModule&, int64_t batch_idx) {
    std::this_thread::sleep_for(std::chrono::milliseconds(110));
    seen.push_back(drawn());
    size.ws_col = batch_idx == 0 ? 90 : 72;
    ioctl(master, TIOCSWINSZ, &size);
  };
  Trainer trainer(
      quiet(dir).enable_progress_bar(true).callbacks({bar}).max_epochs(1).limit_val_batches(
          int64_t{0}));
  trainer.fit(module);
  REQUIRE(seen.size() == 4);
  REQUIRE(seen[0].size() == 1);
  REQUIRE(seen[1].size() == 1);
  REQUIRE(seen[2].size() == 1);
  CHECK(display_width(seen[0][0]) == 59);
  CHECK(display_width(seen[1][0]) == 89);
  CHECK(display_width(seen[2][0]) == 71);
  close(slave);
  close(master);
}

TEST_CASE("the tuner may switch a bar off and on", "[callbacks]") {
  auto shown = tqdm();
  auto module = std::make_shared<ShownModule>();
  module->before_training_step = [&](BoringModule&, int64_t batch_idx) {
    if (batch_idx == 0) shown.bar->disable();
    CHECK(shown.screen->lines().empty());
    if (batch_idx == 3) shown.bar->enable();
  };
  Trainer trainer(shown.options().max_epochs(1).limit_val_batches(int64_t{0}));
  trainer.fit(module);
  CHECK(shown.screen->lines().size() == 1);
}

TEST_CASE("the rich bar has rich's columns", "[callbacks]") {
  auto bar = std::make_shared<RichProgressBar>();
  bar->set_colors(ColorSystem::kTruecolor);
  Shown<RichProgressBar> shown(bar, std::make_shared<Screen>(120));
  auto module = std::make_shared<ShownModule>();
  Lines seen;
  module->in_validation_step = [&] { seen = shown.screen->lines(); };
  Trainer trainer(shown.options().max_epochs(1));
  trainer.fit(module);

  const std::string rest = "[━╸╺]+ [0-9]/[0-9] 0:00:00 • [0-9:-]+ +[0-9.]+it/s";
  REQUIRE(seen.size() == 2);
  CHECK_THAT(seen[0], Matches("Epoch 0/0  " + rest + " +tl: 0.141"));
  CHECK_THAT(seen[1], Matches("Validation " + rest));
  REQUIRE(shown.screen->lines().size() == 1);
  CHECK_THAT(shown.screen->bytes(),
             Contains("\x1b[38;2;98;6;224m━") && Contains("\x1b[3mtl: 0.141"));
}

TEST_CASE("the rich bar puts metrics below where the window is narrow", "[callbacks]") {
  auto bar = std::make_shared<RichProgressBar>();
  bar->set_colors(ColorSystem::kNone);
  Shown<RichProgressBar> shown(bar, std::make_shared<Screen>(60));
  Trainer trainer(shown.options().max_epochs(1).limit_val_batches(int64_t{0}));
  trainer.fit(std::make_shared<ShownModule>());
  const Lines lines = shown.screen->lines();
  REQUIRE(lines.size() == 2);
  CHECK_THAT(lines[0], Contains("Epoch 0/0") && Contains("4/4"));
  CHECK(lines[1] == "tl: 0.141");
}

TEST_CASE("the rich bar pulses where the length is not known", "[callbacks]") {
  auto bar = std::make_shared<RichProgressBar>(
      RichProgressBarOptions().theme(RichProgressBarTheme().metrics_format(".1e")));
  Shown<RichProgressBar> shown(bar);
  auto module = std::make_shared<ShownModule>();
  Lines seen;
  module->before_training_step = [&](BoringModule&, int64_t) { seen = shown.screen->lines(); };
  Trainer trainer(shown.options().max_epochs(1).limit_val_batches(int64_t{0}));
  trainer.fit(module, std::make_shared<Stream>());
  REQUIRE_FALSE(seen.empty());
  CHECK_THAT(seen[0], Contains("/--") && Contains("-:--:--"));
  CHECK_THAT(shown.screen->bytes(), Contains("tl: 1.4e-01"));
}

TEST_CASE("options that make no sense are refused", "[callbacks]") {
  CHECK_THROWS_WITH(TQDMProgressBar(TQDMProgressBarOptions().refresh_rate(-1)),
                    Contains("got refresh_rate -1"));
  CHECK_THROWS_WITH(TQDMProgressBar(TQDMProgressBarOptions().process_position(-2)),
                    Contains("got process_position -2"));
  CHECK_THROWS_WITH(RichProgressBar(RichProgressBarOptions().refresh_rate(-1)),
                    Contains("got refresh_rate -1"));
  const auto theme = RichProgressBarTheme().time("dimm");
  CHECK_THROWS_WITH(RichProgressBar(RichProgressBarOptions().theme(theme)),
                    Contains("theme.time") && Contains("Did you mean \"dim\"?"));
  const auto format = RichProgressBarTheme().metrics_format(".3d");
  CHECK_THROWS_WITH(RichProgressBar(RichProgressBarOptions().theme(format)),
                    Contains("metrics_format \".3d\""));
  CHECK_THROWS_WITH(PlainProgressBar(PlainProgressBarOptions().interval(0)),
                    Contains("got interval 0"));
}

TEST_CASE("the environment raises the refresh rate", "[callbacks]") {
  setenv("TQDM_MINITERS", "50", 1);
  CHECK(TQDMProgressBar().refresh_rate() == 50);
  CHECK(TQDMProgressBar(TQDMProgressBarOptions().refresh_rate(80)).refresh_rate() == 80);
  setenv("TQDM_MINITERS", "often", 1);
  CHECK_THROWS_WITH(TQDMProgressBar(), Contains("TQDM_MINITERS is \"often\""));
  unsetenv("TQDM_MINITERS");
  setenv("COLAB_GPU", "1", 1);
  CHECK(TQDMProgressBar().refresh_rate() == 20);
  unsetenv("COLAB_GPU");
}
