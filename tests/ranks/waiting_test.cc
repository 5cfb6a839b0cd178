// Ranks that wait for others in vain: in a call that one makes alone, or for a world that nobody
// else joins. What they wait for is said, and a signal ends them.
#include <signal.h>
#include <torch/torch.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <thread>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "lightning.h"
#include "strategies/ddp.h"
#include "strategies/fsdp.h"
#include "tests/support/boring.h"
#include "tests/support/ranks.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;

namespace {

TrainerOptions options() {
  return TrainerOptions()
      .accelerator("cpu")
      .devices(2)
      .max_epochs(1)
      .logger(false)
      .enable_progress_bar(false)
      .enable_model_summary(false)
      .enable_checkpointing(false)
      .default_root_dir(Ranks::folder());
}

void sleep_for(int seconds) { std::this_thread::sleep_for(std::chrono::seconds(seconds)); }

// Tells the test which process this is.
void note_process(int64_t rank) {
  const auto file = Ranks::folder() + str("/process", rank);
  std::ofstream(file + ".new") << ::getpid();
  std::filesystem::rename(file + ".new", file);
}

// Sends a signal, once, to a rank that has noted its process.
std::function<void()> signals(const Ranks& ranks, int64_t rank, int number) {
  return [file = ranks.dir().path(str("process", rank)), number, sent = false]() mutable {
    pid_t pid = 0;
    if (sent || !(std::ifstream(file) >> pid)) return;
    sent = true;
    ::kill(pid, number);
  };
}

}  // namespace

TEST_CASE("program: one rank alone makes a call", "[.program]") {
  for (const int number : {SIGTERM, SIGINT}) ::signal(number, SIG_DFL);  // Catch has its own
  const auto what = Ranks::variable("WHAT");
  const bool fsdp = what == "whole_parameters";
  Trainer trainer(options().strategy(fsdp ? "fsdp" : "ddp"));
  auto module = std::make_shared<BoringModule>();
  module->before_training_step = [&](BoringModule& m, int64_t batch_idx) {
    if (batch_idx != 1) return;
    if (trainer.global_rank() == 1 && Ranks::variable("OTHER") == "sleeps") sleep_for(50);
    note_process(trainer.global_rank());
    if (trainer.global_rank() != 0) {
      // Not over Gloo, which may end a process whose message is not of the size that it expects.
      if (Ranks::variable("OTHER") == "waits") trainer.strategy().wait_for_all("a download");
      return;
    }
    if (what == "save_checkpoint") trainer.save_checkpoint(Ranks::folder() + "/alone.ckpt");
    if (what == "log") m.log("x", at::ones({}), LogOptions().on_step(true).sync_dist(true));
    if (what == "barrier") trainer.strategy().barrier("after the download");
    if (what == "whole_parameters") whole_parameters(trainer.strategy());
  };
  trainer.fit(module);
}

TEST_CASE("a signal ends ranks of which one waits in a call that it makes alone", "[ranks]") {
  struct Case {
    const char* what;
    const char* call;
    int number;
    int64_t rank;
    const char* other;
  };
  const auto [what, call, number, rank, other] = GENERATE(values<Case>({
      {"save_checkpoint", "`Trainer.save_checkpoint`", SIGTERM, 0, "trains"},
      {"save_checkpoint", "`Trainer.save_checkpoint`", SIGINT, 1, "trains"},
      {"log", "`log(\"x\", sync_dist)`", SIGTERM, 0, "waits"},
      {"barrier", "`after the download`", SIGTERM, 1, "trains"},
      {"whole_parameters", "`whole_parameters`", SIGINT, 0, "waits"},
  }));
  CAPTURE(what, number, rank);
  Ranks ranks;
  const auto ended =
      ranks.run("program: one rank alone makes a call", {{"WHAT", what}, {"OTHER", other}}, {},
                signals(ranks, rank, number));
  INFO(ended.output);
  CHECK(ended.status == 128 + number);
  CHECK(ended.still_running == 0);
  CHECK_THAT(ended.output,
             Contains(str("has waited in ", call)) && Contains("is not in it") &&
                 Contains(str("asked to end by SIG", number == SIGINT ? "INT" : "TERM")));
}

TEST_CASE("a signal ends ranks of which one waits and another works for long", "[ranks]") {
  Ranks ranks;
  const auto ended =
      ranks.run("program: one rank alone makes a call",
                {{"WHAT", "save_checkpoint"}, {"OTHER", "sleeps"}}, {}, signals(ranks, 0, SIGTERM));
  INFO(ended.output);
  CHECK(ended.status == 128 + SIGTERM);
  CHECK(ended.still_running == 0);
  CHECK_THAT(ended.output, Contains("Rank 0 of 2") &&
                               Contains("has waited in `Trainer.save_checkpoint`") &&
                               Contains("rank 1 is not in it: it works outside of such calls"));
}

TEST_CASE("program: saves for long", "[.program]") {
  ::signal(SIGTERM, SIG_DFL);
  Trainer trainer(
      options().max_epochs(2).strategy("ddp").callbacks({std::make_shared<LambdaCallback>(
          LambdaHooks().on_save_checkpoint([](Trainer& t, LightningModule&, State&) {
            if (t.is_global_zero()) sleep_for(9);
          }))}));
  auto module = std::make_shared<BoringModule>();
  module->before_training_step = [&](BoringModule&, int64_t batch_idx) {
    if (batch_idx != 1) return;
    note_process(trainer.global_rank());
    trainer.save_checkpoint(Ranks::folder() + "/slow.ckpt");
  };
  CHECK_THROWS_AS(trainer.fit(module), SIGTERMException);
}

TEST_CASE("a rank that works in a call of all is waited for after a signal", "[ranks]") {
  Ranks ranks;
  const auto ended = ranks.run("program: saves for long", {}, {}, signals(ranks, 1, SIGTERM));
  INFO(ended.output);
  CHECK(ended.status == 0);
  CHECK(ended.still_running == 0);
  CHECK(std::filesystem::exists(ranks.dir().path("slow.ckpt")));
}

TEST_CASE("program: is left alone in a call until the timeout", "[.program]") {
  Trainer trainer(options().strategy(DDPStrategyOptions().timeout(std::string("00:00:00:02"))));
  auto module = std::make_shared<BoringModule>();
  module->before_training_step = [&](BoringModule&, int64_t batch_idx) {
    if (batch_idx != 1) return;
    if (trainer.global_rank() == 1) sleep_for(20);
    trainer.save_checkpoint(Ranks::folder() + "/alone.ckpt");
  };
  trainer.fit(module);
}

TEST_CASE("a timeout names the call, the rank, the time and what the others do", "[ranks]") {
  Ranks ranks;
  const auto ended = ranks.run("program: is left alone in a call until the timeout");
  INFO(ended.output);
  CHECK(ended.status == 1);
  CHECK(ended.still_running == 0);
  CHECK_THAT(ended.output, Contains("`Trainer.save_checkpoint` on rank 0 of 2 waited 2 s") &&
                               Contains("Timed out waiting 2000ms") &&
                               Contains("rank 1 works outside of such calls") &&
                               Contains("All ranks must make the same calls") &&
                               Contains(".timeout("));
}

// ---- A world that nobody else joins -------------------------------------------------------------

namespace {

std::string free_port() {
  c10d::TCPStoreOptions store;
  store.isServer = true;
  store.port = 0;
  store.waitWorkers = false;
  return std::to_string(c10::make_intrusive<c10d::TCPStore>("127.0.0.1", store)->getPort());
}

size_t count(const std::string& text, const std::string& part) {
  size_t times = 0;
  for (auto at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++times;
  return times;
}

}  // namespace

TEST_CASE("program: fits in a world", "[.program]") {
  for (const int number : {SIGTERM, SIGINT}) ::signal(number, SIG_DFL);
  Trainer trainer(options());
  note_process(trainer.global_rank());
  try {
    trainer.fit(std::make_shared<BoringModule>());
  } catch (const std::exception& error) {
    std::cerr << error.what() << std::endl;  // unbroken
    throw;
  }
}

TEST_CASE("a rank that nobody joins says what it waits for, from where, and what to do",
          "[ranks]") {
  struct Case {
    const char* rank;
    const char* there;
  };
  const auto [rank, there] =
      GENERATE(values<Case>({{"0", "1 of 2 are there"}, {"1", "rank 0 has not answered yet"}}));
  const auto port = free_port();
  Ranks ranks;
  const auto ended = ranks.run("program: fits in a world", {{"LOCAL_RANK", rank},
                                                            {"WORLD_SIZE", "2"},
                                                            {"MASTER_PORT", port},
                                                            {"LIGHTNING_JOIN_TIMEOUT", "14"}});
  INFO(ended.output);
  CHECK(ended.status == 1);
  CHECK(ended.still_running == 0);
  CHECK_THAT(
      ended.output,
      Contains("Waiting for the other ranks of the run at 127.0.0.1:" + port) && Contains(there));
  // Once while it waits, once in the error.
  const auto place =
      str("this is rank ", rank, " of 2 by LOCAL_RANK=", rank, ", WORLD_SIZE=2 in the environment");
  CHECK(count(ended.output, place) >= 2);
  CHECK(count(ended.output, "`unset LOCAL_RANK WORLD_SIZE`") >= 2);
}

TEST_CASE("a signal ends a rank that waits for others to join", "[ranks]") {
  Ranks ranks;
  const auto ended = ranks.run(
      "program: fits in a world", {{"LOCAL_RANK", "0"}, {"WORLD_SIZE", "2"}}, {},
      [&, started = std::chrono::steady_clock::now(), send = signals(ranks, 0, SIGTERM)]() mutable {
        const auto waited = std::chrono::steady_clock::now() - started;
        if (waited > std::chrono::seconds(5)) send();
      });
  INFO(ended.output);
  CHECK(ended.status == 128 + SIGTERM);
  CHECK(ended.still_running == 0);
}
