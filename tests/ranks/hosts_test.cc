// Two hosts of two ranks each: network namespaces with a cable between them. Needs root and
// iproute2; stands aside where it may not make a namespace.
#include <signal.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cstdlib>
#include <fstream>

#include "lightning.h"
#include "tests/support/boring.h"
#include "tests/support/ranks.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;

namespace {

constexpr const char* kFirst = "10.213.7.1";
constexpr const char* kSecond = "10.213.7.2";

bool does(const std::string& command) {
  return std::system(("(" + command + ") >/dev/null 2>&1").c_str()) == 0;
}

class Hosts {
 public:
  Hosts() : first_(str("lt", ::getpid(), "a")), second_(str("lt", ::getpid(), "b")) {
    const auto inside = [](const std::string& host, const std::string& what) {
      return " && ip -n " + host + " " + what;
    };
    made_ = does("ip netns add " + first_ + " && ip netns add " + second_ + " && ip link add " +
                 first_ + " type veth peer name " + second_ + " && ip link set " + first_ +
                 " netns " + first_ + " && ip link set " + second_ + " netns " + second_ +
                 inside(first_, str("addr add ", kFirst, "/24 dev ", first_)) +
                 inside(second_, str("addr add ", kSecond, "/24 dev ", second_)) +
                 inside(first_, "link set lo up") + inside(second_, "link set lo up") +
                 inside(first_, "link set " + first_ + " up") +
                 inside(second_, "link set " + second_ + " up"));
  }
  ~Hosts() {
    does("ip netns del " + first_);
    does("ip netns del " + second_);
    does("ip link del " + first_);
  }
  Hosts(const Hosts&) = delete;
  Hosts& operator=(const Hosts&) = delete;

  explicit operator bool() const { return made_; }

  // A shell that runs `program` with the words that follow on both hosts, NODE set to 0 and 1, and
  // gives the highest status.
  std::vector<std::string> launcher(const std::string& program) const {
    const auto on = [&](const std::string& host, const char* node) {
      return "ip netns exec " + host + " env NODE=" + node + " NODE_RANK=" + node + " bash -c '" +
             program + "' bash \"$@\" & pids=\"$pids $!\"; ";
    };
    return {"bash", "-c",
            "pids=; " + on(first_, "0") + on(second_, "1") +
                "worst=0; for p in $pids; do wait $p; s=$?; [ $s -gt $worst ] && worst=$s; done; "
                "exit $worst",
            "bash"};
  }
  void cut_the_cable() const { does("ip -n " + second_ + " link set " + second_ + " down"); }
  void kill_second() const { does("kill -9 $(ip netns pids " + second_ + ")"); }

 private:
  std::string first_, second_;
  bool made_ = false;
};

bool trains(const Ranks& ranks) {
  for (const char* name : {"step0", "step1", "step2", "step3"}) {
    if (::access(ranks.dir().path(name).c_str(), F_OK) != 0) return false;
  }
  return true;
}

}  // namespace

TEST_CASE("program: fits on two hosts", "[.program]") {
  Trainer trainer(TrainerOptions()
                      .accelerator("cpu")
                      .devices("auto" == Ranks::variable("DEVICES") ? DevicesFlag("auto")
                                                                    : DevicesFlag(int64_t{2}))
                      .num_nodes(2)
                      .max_steps(std::stoll(Ranks::variable("STEPS")))
                      .logger(false)
                      .enable_progress_bar(false)
                      .enable_model_summary(false)
                      .enable_checkpointing(false)
                      .default_root_dir(Ranks::folder()));
  auto module = std::make_shared<BoringModule>();
  module->before_training_step = [&](BoringModule& m, int64_t) {
    std::ofstream(Ranks::folder() + str("/step", m.global_rank())) << trainer.world_size();
  };
  trainer.fit(module);
}

TEST_CASE("two hosts train together", "[ranks]") {
  const Hosts hosts;
  if (!hosts) {
    WARN("needs root and iproute2");
    return;
  }
  const std::string way = GENERATE("started once on each", "torchrun");
  const auto given = Ranks::variable("LIGHTNING_PYTHON");
  const auto python = given.empty() ? std::string(".venv/bin/python") : given;
  const auto torchrun =
      python +
      " -m torch.distributed.run --no-python --nnodes=2 --node-rank=$NODE "
      "--nproc-per-node=2 --master-addr=$MASTER_ADDR --master-port=$MASTER_PORT \"$@\"";
  CAPTURE(way);
  Ranks ranks;
  const auto ended = ranks.run("program: fits on two hosts",
                               {{"MASTER_ADDR", kFirst}, {"MASTER_PORT", "29511"}, {"STEPS", "3"}},
                               hosts.launcher(way == "torchrun" ? torchrun : "\"$@\""));
  INFO(ended.output);
  CHECK(ended.status == 0);
  CHECK(ended.still_running == 0);
  CHECK(trains(ranks));
}

TEST_CASE("a host that is gone ends the other", "[ranks]") {
  const Hosts hosts;
  if (!hosts) {
    WARN("needs root and iproute2");
    return;
  }
  const std::string how = GENERATE("its processes are killed", "its cable is cut");
  CAPTURE(how);
  Ranks ranks;
  bool gone = false;
  const auto ended =
      ranks.run("program: fits on two hosts",
                {{"MASTER_ADDR", kFirst}, {"MASTER_PORT", "29511"}, {"STEPS", "-1"}},
                hosts.launcher("\"$@\""), [&] {
                  if (gone || !trains(ranks)) return;
                  how == "its cable is cut" ? hosts.cut_the_cable() : hosts.kill_second();
                  gone = true;
                });
  INFO(ended.output);
  CHECK(ended.status != 0);
  CHECK(ended.status != -1);
  CHECK(ended.still_running == 0);
  REQUIRE(gone);
  CHECK_THAT(ended.output, Contains("of 4 on host") &&
                               Contains("lost its connection without a word: it was killed, or its "
                                        "host is gone.") &&
                               Contains("All processes of the run end."));
}
