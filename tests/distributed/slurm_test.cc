// A job of SLURM, with a script in the place of scontrol that notes what it is called with.
#include "lightning/distributed/slurm.h"

#include <sys/stat.h>
#include <torch/nn/module.h>

#include <catch2/catch.hpp>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>

#include "lightning/checkpoint/async_io.h"
#include "lightning/errors.h"
#include "lightning/files.h"
#include "lightning/log.h"
#include "lightning/trainer.h"
#include "tests/support/boring.h"
#include "tests/support/memory_logger.h"
#include "tests/support/temp_dir.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;
namespace fs = std::filesystem;

namespace {

using Variables = std::map<std::string, std::string>;

// Environment variables while alive; an empty value is none.
class Environment {
 public:
  explicit Environment(const Variables& variables) {
    for (const auto& [name, value] : variables) {
      const char* before = std::getenv(name.c_str());
      before_[name] = before != nullptr ? before : "";
      set(name, value);
    }
  }
  ~Environment() {
    for (const auto& [name, value] : before_) set(name, value);
  }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

 private:
  static void set(const std::string& name, const std::string& value) {
    value.empty() ? unsetenv(name.c_str()) : setenv(name.c_str(), value.c_str(), 1);
  }
  std::map<std::string, std::string> before_;
};

std::map<std::string, std::string> job(const TempDir& dir) {
  return {{"SLURM_NTASKS", "1"},       {"SLURM_JOB_NAME", "training"},
          {"SLURM_JOB_ID", "1234"},    {"SLURM_ARRAY_JOB_ID", ""},
          {"SLURM_ARRAY_TASK_ID", ""}, {"PATH", dir.path("bin") + ":" + std::getenv("PATH")}};
}

// A scontrol that does `then` after it noted its arguments.
void make_scontrol(const TempDir& dir, const std::string& then) {
  make_directories(dir.path("bin"));
  write_file(dir.path("bin/scontrol"), "#!/bin/sh\nls " + dir.path() + "/*.ckpt >> " +
                                           dir.path("files") + "\necho \"$@\" >> " +
                                           dir.path("called") + "\n" + then + "\n");
  chmod(dir.path("bin/scontrol").c_str(), 0755);
}

struct Lines {
  Lines() {
    set_log_sink([this](const std::string& line) { text += line + "\n"; });
  }
  ~Lines() { set_log_sink(nullptr); }
  std::string text;
};

std::shared_ptr<BoringModule> raising(int64_t at_step, int number) {
  auto module = std::make_shared<BoringModule>();
  module->before_training_step = [at_step, number](BoringModule& of, int64_t) {
    if (of.global_step() == at_step) std::raise(number);
  };
  return module;
}

}  // namespace

TEST_CASE("a job of SLURM is told from a shell of it", "[distributed]") {
  const TempDir dir;
  const Environment environment(job(dir));
  CHECK(SLURMEnvironment::detect());
  CHECK(SLURMEnvironment::job_id() == "1234");
  for (const std::string name : {"bash", "interactive"}) {
    const Environment shell(Variables{{"SLURM_JOB_NAME", name}});
    CHECK_FALSE(SLURMEnvironment::detect());
  }
  const Environment none(Variables{{"SLURM_NTASKS", ""}});
  CHECK_FALSE(SLURMEnvironment::detect());
}

TEST_CASE("scontrol is asked to requeue the job, and its words are in the error", "[distributed]") {
  const TempDir dir;
  const Environment environment(job(dir));
  make_scontrol(dir, "");
  const SLURMEnvironment slurm;
  slurm.requeue();
  {
    const Environment array(Variables{{"SLURM_ARRAY_JOB_ID", "99"}, {"SLURM_ARRAY_TASK_ID", "7"}});
    slurm.requeue();
  }
  CHECK(read_file(dir.path("called")) == "requeue 1234\nrequeue 99_7\n");

  make_scontrol(dir, "echo 'Requested operation is presently disabled' >&2; exit 1");
  CHECK_THROWS_WITH(slurm.requeue(), Contains("scontrol requeue 1234 ended with status 1") &&
                                         Contains("presently disabled"));
  make_scontrol(dir, "exec sleep 30");
  CHECK_THROWS_WITH(slurm.requeue(std::chrono::seconds(0)), Contains("no answer in 0 s"));
  {
    const Environment odd(Variables{{"SLURM_JOB_ID", "1; rm"}});
    CHECK_THROWS_WITH(slurm.requeue(), Contains("1; rm"));
  }
  const Environment nowhere(Variables{{"PATH", dir.path()}});
  CHECK_THROWS_WITH(slurm.requeue(), Contains("Cannot run scontrol"));
}

TEST_CASE("a signal for the requeueing must be one that means nothing else", "[distributed]") {
  using Options = SLURMEnvironmentOptions;
  CHECK(SLURMEnvironment(Options().requeue_signal("USR2")).requeue_signal() == SIGUSR2);
  CHECK(SLURMEnvironment(Options().requeue_signal("10")).requeue_signal() == 10);
  CHECK_THROWS_WITH(SLURMEnvironment(Options().requeue_signal("SIGUSR3")), Contains("SIGUSR3"));
  CHECK_THROWS_WITH(SLURMEnvironment(Options().requeue_signal("SIGTERM")),
                    Contains("has another meaning"));
}

TEST_CASE("SLURM's signal saves the run at the end of the batch, requeues, and training goes on",
          "[distributed]") {
  const TempDir dir;
  const Environment environment(job(dir));
  make_scontrol(dir, "");
  write_file(dir.path("hpc_ckpt_3.txt"), "");
  auto logger = std::make_shared<MemoryLogger>();
  const bool background = GENERATE(false, true);
  CAPTURE(background);
  auto options = quiet(dir).logger(logger).max_epochs(2);
  if (background) options.plugins({std::make_shared<AsyncCheckpointIO>()});
  {
    const Lines lines;
    Trainer trainer(options);
    trainer.fit(raising(5, SIGUSR1));
    CHECK(trainer.global_step() == 8);
    CHECK_THAT(lines.text, Contains("Requeued SLURM job: 1234"));
  }
  CHECK(read_file(dir.path("called")) == "requeue 1234\n");
  CHECK(read_file(dir.path("files")) == dir.path("hpc_ckpt_1.ckpt\n"));  // when scontrol ran
  CHECK(std::signal(SIGUSR1, SIG_DFL) == SIG_DFL);

  // The job starts again.
  std::vector<int64_t> steps;
  auto module = std::make_shared<BoringModule>();
  module->before_training_step = [&](BoringModule& of, int64_t) {
    steps.push_back(of.global_step());
  };
  Trainer again(quiet(dir).max_epochs(2));
  again.fit(module);
  CHECK(again.ckpt_path() == dir.path("hpc_ckpt_1.ckpt"));
  CHECK(steps == std::vector<int64_t>{6, 7});
}

TEST_CASE("a job that cannot be requeued goes on and says so", "[distributed]") {
  const TempDir dir;
  const Environment environment(job(dir));
  make_scontrol(dir, "echo disabled; exit 1");
  const Lines lines;
  Trainer trainer(quiet(dir).max_epochs(1));
  trainer.fit(raising(1, SIGUSR1));
  CHECK(trainer.global_step() == 4);
  CHECK_THAT(lines.text, Contains("The SLURM job was not requeued") && Contains("disabled"));
}

TEST_CASE("SIGTERM under SLURM keeps the state and does not end the run", "[distributed]") {
  const TempDir dir;
  std::signal(SIGTERM, SIG_DFL);  // without Catch's handler, which ours would call
  const Environment environment(job(dir));
  make_scontrol(dir, "");
  {
    const Lines lines;
    Trainer trainer(quiet(dir).max_epochs(1));
    trainer.fit(raising(1, SIGTERM));
    CHECK(trainer.global_step() == 4);
    CHECK_THAT(lines.text, Contains("Bypassing SIGTERM"));
    CHECK(fs::exists(dir.path("hpc_ckpt_1.ckpt")));
    CHECK_FALSE(fs::exists(dir.path("called")));
  }
  Trainer trainer(quiet(dir).max_epochs(1).plugins(
      {std::make_shared<SLURMEnvironment>(SLURMEnvironmentOptions().auto_requeue(false))}));
  CHECK_THROWS_AS(trainer.fit(raising(3, SIGTERM)), SIGTERMException);
}

TEST_CASE("another signal, and a handler of the program's own", "[distributed]") {
  const TempDir dir;
  const Environment environment(job(dir));
  make_scontrol(dir, "");
  TrainerOptions options = quiet(dir).max_epochs(1);
  Json plugins = Json::parse(R"({"plugins": [{"class_path":
    "lightning.pytorch.plugins.environments.SLURMEnvironment",
    "init_args": {"requeue_signal": "SIGUSR2"}}]})");
  options.read(plugins, "trainer");
  Trainer(options).fit(raising(1, SIGUSR2));
  CHECK(read_file(dir.path("called")) == "requeue 1234\n");

  static int own = 0;
  std::signal(SIGUSR2, [](int) { ++own; });
  Trainer(options).fit(raising(2, SIGUSR2), {}, {}, RunArguments());
  std::signal(SIGUSR2, SIG_DFL);
  CHECK(own == 1);
  CHECK(read_file(dir.path("called")) == "requeue 1234\n");
}
