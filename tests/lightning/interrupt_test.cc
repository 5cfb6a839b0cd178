// Ctrl-C and SIGTERM, sent to a run in a process of its own: this binary, started again with the
// hidden test case at the end of the file.
#include <signal.h>
#include <sys/wait.h>
#include <torch/torch.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <csignal>
#include <cstdlib>
#include <iostream>
#include <string>
#include <thread>

#include "lightning/data/data_loader.h"
#include "lightning/errors.h"
#include "lightning/module.h"
#include "lightning/trainer.h"
#include "tests/support/temp_dir.h"

using namespace lightning;
using Catch::Contains;
using lightning::testing::TempDir;

namespace {

constexpr const char* kChild = "a run that waits for a signal";

// Starts the child and reads what it prints until a line comes; kills it in the end.
class Child {
 public:
  explicit Child(const std::string& at_exception) {
    int ends[2];
    REQUIRE(pipe(ends) == 0);
    pid_ = fork();
    if (pid_ == 0) {
      dup2(ends[1], STDOUT_FILENO);
      setenv("AT_EXCEPTION", at_exception.c_str(), 1);
      execl("/proc/self/exe", "child", kChild, static_cast<char*>(nullptr));
      _exit(127);
    }
    close(ends[1]);
    out_ = fdopen(ends[0], "r");
  }
  ~Child() {
    if (!ended_) {
      ::kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
    }
    fclose(out_);
  }

  void read_until(const std::string& wanted) {
    while (text_.find(wanted) == std::string::npos) {
      char line[4096];
      if (fgets(line, sizeof line, out_) == nullptr) FAIL("ended before \"" << wanted << '"');
      text_ += line;
    }
  }
  void send(int number) const { REQUIRE(::kill(pid_, number) == 0); }
  int exit_code() {
    char line[4096];
    while (fgets(line, sizeof line, out_) != nullptr) text_ += line;
    int status = 0;
    waitpid(pid_, &status, 0);
    ended_ = true;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }
  const std::string& text() const { return text_; }

 private:
  pid_t pid_ = 0;
  FILE* out_ = nullptr;
  bool ended_ = false;
  std::string text_;
};

void say(const std::string& line) { std::cout << line << std::endl; }

struct Endless : LightningModule {
  torch::nn::Linear layer{register_module("layer", torch::nn::Linear(1, 1))};

  StepOutput training_step(const Batch& batch, int64_t batch_idx) override {
    say(str("batch ", batch_idx));
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    return layer->forward(batch[0]).sum();
  }
  Optimizers configure_optimizers() override { return torch::optim::SGD(parameters(), 0.01); }
  void on_fit_end() override { say("on_fit_end"); }
  void teardown(Stage) override { say("module teardown"); }
};

struct Speaker : Callback {
  void on_exception(Trainer&, LightningModule&, const std::exception& exception) override {
    say(str("on_exception: ", exception.what()));
    const char* then = std::getenv("AT_EXCEPTION");
    if (then != nullptr && std::string(then) == "hang") {
      std::this_thread::sleep_for(std::chrono::seconds(60));
    }
  }
  void on_train_end(Trainer&, LightningModule&) override { say("on_train_end"); }
  void teardown(Trainer&, LightningModule&, Stage) override { say("callback teardown"); }
};

}  // namespace

TEST_CASE("Ctrl-C ends fit after the batch: on_exception, no teardown hooks, status 1",
          "[trainer]") {
  Child child("");
  child.read_until("batch 3");
  child.send(SIGINT);
  CHECK(child.exit_code() == 1);
  CHECK_THAT(child.text(), Contains("on_exception: interrupted from the keyboard"));
  CHECK_THAT(child.text(), !Contains("teardown") && !Contains("on_fit_end") &&
                               !Contains("on_train_end") && !Contains("fit returned"));
}

TEST_CASE("a second Ctrl-C ends the program at once", "[trainer]") {
  Child child("hang");
  child.read_until("batch 3");
  child.send(SIGINT);
  child.read_until("on_exception");
  child.send(SIGINT);
  CHECK(child.exit_code() == 130);
}

TEST_CASE("SIGTERM leaves fit as an exception that callbacks see", "[trainer]") {
  Child child("");
  child.read_until("batch 3");
  child.send(SIGTERM);
  CHECK(child.exit_code() == 0);
  CHECK_THAT(child.text(), Contains("on_exception: ended by SIGTERM") &&
                               Contains("caught SIGTERMException") && !Contains("teardown"));
}

TEST_CASE(kChild, "[.child]") {
  std::signal(SIGTERM, SIG_DFL);  // without Catch's handler, which ours would call
  TempDir dir;
  const auto data =
      std::make_shared<TensorDataset>(std::initializer_list<at::Tensor>{torch::ones({100000, 1})});
  Trainer trainer(TrainerOptions()
                      .callbacks({std::make_shared<Speaker>()})
                      .logger(false)
                      .enable_checkpointing(false)
                      .enable_progress_bar(false)
                      .enable_model_summary(false)
                      .default_root_dir(dir.path()));
  try {
    trainer.fit(std::make_shared<Endless>(), DataLoader(data, DataLoaderOptions().num_workers(2)));
    say("fit returned");
  } catch (const SIGTERMException&) {
    say("caught SIGTERMException");
  }
}
