// The processes of a run: started by the program itself or by others, and their ends.
#include <signal.h>
#include <torch/torch.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <chrono>
#include <fstream>
#include <iostream>
#include <thread>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "lightning.h"
#include "lightning/distributed/last_words.h"
#include "lightning/distributed/rank_zero.h"
#include "lightning/distributed/world.h"
#include "strategies/ddp.h"
#include "tests/support/boring.h"
#include "tests/support/ranks.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;

namespace {

TrainerOptions options() {
  const auto given = [](const char* name, const char* otherwise) {
    const auto value = Ranks::variable(name);
    return value.empty() ? std::string(otherwise) : value;
  };
  return TrainerOptions()
      .accelerator(given("ACCELERATOR", "cpu"))
      .devices(given("DEVICES", "2"))
      .num_nodes(std::stoll(given("NODES", "1")))
      .strategy(given("STRATEGY", "auto"))
      .max_epochs(1)
      .logger(false)
      .enable_progress_bar(false)
      .enable_model_summary(false)
      .enable_checkpointing(false)
      .default_root_dir(Ranks::folder());
}

void note(const std::string& name, const std::string& text) {
  std::ofstream(Ranks::folder() + "/" + name) << text;
}

// Of runs that also go over NCCL where a machine has two GPUs.
Variables on_any(Variables variables = {}) {
  variables["ACCELERATOR"] = Ranks::accelerator();
  return variables;
}

std::string noted(const Ranks& ranks, const std::string& name) {
  std::ifstream file(ranks.dir().path(name));
  std::string text;
  std::getline(file, text, '\0');
  return text;
}

}  // namespace

TEST_CASE("program: fits", "[.program]") {
  try {
    Trainer trainer(options());
    auto module = std::make_shared<BoringModule>();
    module->before_training_step = [&](BoringModule&, int64_t) {
      note(str("rank", trainer.global_rank()),
           str(trainer.global_rank(), " ", trainer.local_rank(), " ", trainer.world_size(), " ",
               trainer.is_global_zero(), " ", trainer.num_training_batches().value()));
    };
    trainer.fit(module);
  } catch (const std::exception& error) {
    std::cerr << error.what() << std::endl;  // unbroken
    throw;
  }
}

TEST_CASE("a program starts the other ranks of its node itself", "[ranks]") {
  Ranks ranks;
  const auto ended = ranks.run("program: fits", on_any());
  INFO(ended.output);
  CHECK(ended.status == 0);
  CHECK(ended.still_running == 0);
  CHECK(noted(ranks, "rank0") == "0 0 2 1 2");
  CHECK(noted(ranks, "rank1") == "1 1 2 0 2");
}

TEST_CASE("program: has many collectives under way", "[.program]") {
  Trainer trainer(options().limit_train_batches(1).limit_val_batches(0));
  auto module = std::make_shared<BoringModule>();
  module->before_training_step = [&](BoringModule&, int64_t) {
    const auto& group = World::current()->group();
    const auto ranks = World::current()->world_size();
    for (int64_t round = 0; round < 500; ++round) {
      std::vector<at::Tensor> gathered;
      std::vector<c10::intrusive_ptr<c10d::Work>> works;
      for (int64_t i = 0; i < 8; ++i) {
        std::vector<at::Tensor> from{at::full({3}, trainer.global_rank() + 10 * i, at::kFloat)};
        std::vector<at::Tensor> to{at::empty({3 * ranks})};
        works.push_back(group->allgather_into_tensor_coalesced(to, from));
        gathered.push_back(to[0]);
      }
      for (const auto& work : works) work->wait();
      for (int64_t i = 0; i < 8; ++i) {
        const auto expected = at::arange(ranks).repeat_interleave(3) + 10 * i;
        REQUIRE(at::equal(gathered[static_cast<size_t>(i)], expected.to(at::kFloat)));
      }
    }
    note(str("rank", trainer.global_rank()), "all gathered");
  };
  trainer.fit(module);
}

TEST_CASE("collectives that are under way together do not disturb each other", "[ranks]") {
  Ranks ranks;
  const auto ended = ranks.run("program: has many collectives under way",
                               {{"DEVICES", "4"}, {"OMP_NUM_THREADS", ""}});
  INFO(ended.output);
  CHECK(ended.status == 0);
  CHECK(noted(ranks, "rank3") == "all gathered");
}

// What WHO does in its second step: see below.
TEST_CASE("program: one rank does something else", "[.program]") {
  const auto what = Ranks::variable("WHAT");
  Trainer trainer(options().max_epochs(2).callbacks({std::make_shared<LambdaCallback>(
      LambdaHooks().on_before_backward([&](Trainer& t, LightningModule&, const at::Tensor&) {
        const bool here = std::to_string(t.global_rank()) == Ranks::variable("WHO");
        if (here && what == "killed in backward" && t.global_step() == 1) ::raise(SIGKILL);
      }))}));
  auto module = std::make_shared<BoringModule>();
  module->before_training_step = [&](BoringModule&, int64_t) {
    const bool here = std::to_string(trainer.global_rank()) == Ranks::variable("WHO");
    if (trainer.global_step() == 1 && what == "all raise")
      throw std::runtime_error("all have had enough");
    if (!here || trainer.global_step() != 1) return;
    if (what == "killed in forward") ::raise(SIGKILL);
    if (what == "raises") throw std::runtime_error("the loss is a green elephant");
    if (what == "exits") std::exit(0);
    if (what == "leaves at once") ::_exit(0);
  };
  bool first = true;
  try {
    trainer.fit(module);
  } catch (const std::exception& error) {
    if (what != "all raise") throw;
    note(str("raised", trainer.global_rank()), error.what());
    first = false;
  }
  if (!first) std::exit(3);
}

TEST_CASE("the end of one rank ends all with its name, its host and what happened", "[ranks]") {
  struct Case {
    const char* what;
    const char* error;
  };
  const auto [what, error] = GENERATE(values<Case>({
      {"killed in forward", "ended with signal 9 (Killed) before the others did."},
      {"killed in backward", "ended with signal 9 (Killed) before the others did."},
      {"raises", "failed: the loss is a green elephant"},
      {"exits", "ended its program with exit status 0 in the middle of a run."},
      {"leaves at once", "lost its connection without a word"},
  }));
  CAPTURE(what);
  Ranks ranks;
  const auto ended =
      ranks.run("program: one rank does something else", on_any({{"WHAT", what}, {"WHO", "1"}}));
  INFO(ended.output);
  CHECK(ended.status != 0);
  CHECK(ended.status != -1);
  CHECK(ended.still_running == 0);
  CHECK_THAT(ended.output, Contains(str("Rank 1 of 2 on host ", host_name(), " ", error)));
}

TEST_CASE("the end of rank 0 ends the ranks that it started", "[ranks]") {
  struct Case {
    const char* what;
    const char* error;
    int status;
  };
  const auto [what, error, status] = GENERATE(values<Case>({
      {"killed in forward", "lost its connection without a word", 128 + SIGKILL},
      {"raises", "failed: the loss is a green elephant", 1},
      {"exits", "ended its program with exit status 0 in the middle of a run.", 1},
  }));
  CAPTURE(what);
  Ranks ranks;
  const auto ended =
      ranks.run("program: one rank does something else", on_any({{"WHAT", what}, {"WHO", "0"}}));
  INFO(ended.output);
  CHECK(ended.status == status);
  CHECK(ended.still_running == 0);
  CHECK_THAT(ended.output, Contains(str("Rank 0 of 2 on host ", host_name(), " ", error)));
}

TEST_CASE("where all ranks raise each throws its own error and none is ended", "[ranks]") {
  Ranks ranks;
  const auto ended =
      ranks.run("program: one rank does something else", on_any({{"WHAT", "all raise"}}));
  INFO(ended.output);
  CHECK(ended.status == 3);
  CHECK(ended.still_running == 0);
  CHECK(noted(ranks, "raised0") == "all have had enough");
  CHECK(noted(ranks, "raised1") == "all have had enough");
  CHECK_THAT(ended.output, !Contains("All processes of the run end"));
}

TEST_CASE("program: ends before it fits", "[.program]") {
  if (Ranks::variable("LOCAL_RANK") == "1") ::_exit(Ranks::variable("HOW") == "well" ? 0 : 3);
  Trainer(options()).fit(std::make_shared<BoringModule>());
}

TEST_CASE("a rank that ends before it joins the run ends all", "[ranks]") {
  const std::string how = GENERATE("well", "badly");
  Ranks ranks;
  const auto ended = ranks.run("program: ends before it fits", on_any({{"HOW", how}}));
  INFO(ended.output);
  CHECK(ended.status == 1);
  CHECK(ended.still_running == 0);
  CHECK_THAT(ended.output,
             Contains(str("Rank 1 of 2 on host ", host_name(), " ended with exit status ",
                          how == "well" ? 0 : 3, " before")));
}

TEST_CASE("program: fits once more on one rank", "[.program]") {
  auto module = std::make_shared<BoringModule>();
  Trainer trainer(options());
  trainer.fit(module);
  if (trainer.global_rank() == 1) Trainer(options()).fit(module);
}

TEST_CASE("a run that one rank leaves out ends all", "[ranks]") {
  Ranks ranks;
  const auto ended = ranks.run("program: fits once more on one rank", on_any());
  INFO(ended.output);
  CHECK(ended.status == 1);
  CHECK(ended.still_running == 0);
  CHECK_THAT(ended.output,
             Contains("Rank 0 has ended its program, and rank 1 begins another run") ||
                 Contains("ended its program while other ranks were in a run"));
}

TEST_CASE("program: has Trainers of different worlds", "[.program]") {
  auto module = std::make_shared<BoringModule>();
  Trainer(options()).fit(module);
  CHECK_THROWS_WITH(
      Trainer(options().devices(3)),
      Contains("asks for 3 processes, but this program runs in 2") ||
          Contains("makes 3 processes, but LightningEnvironment says that there are 2"));
  Trainer(options()).validate(module);  // the world is whole
}

TEST_CASE("all Trainers of a program have one world", "[ranks]") {
  Ranks ranks;
  const auto ended = ranks.run("program: has Trainers of different worlds");
  INFO(ended.output);
  CHECK(ended.status == 0);
}

// ---- Started by others --------------------------------------------------------------------------

namespace {

// A shell that starts the program once for each line of variables and gives the highest status.
std::vector<std::string> by_hand(const std::vector<std::string>& variables) {
  std::string script = "pids=; ";
  for (const auto& one : variables) script += "env " + one + " \"$@\" & pids=\"$pids $!\"; ";
  script += "worst=0; for p in $pids; do wait $p; s=$?; [ $s -gt $worst ] && worst=$s; done; ";
  return {"bash", "-c", script + "exit $worst", "bash"};
}

std::string free_port() {
  c10d::TCPStoreOptions store;
  store.isServer = true;
  store.port = 0;
  store.waitWorkers = false;
  return std::to_string(c10::make_intrusive<c10d::TCPStore>("127.0.0.1", store)->getPort());
}

}  // namespace

TEST_CASE("a program joins the ranks that torchrun started", "[ranks]") {
  const auto python = Ranks::variable("LIGHTNING_PYTHON");
  Ranks ranks;
  const auto ended =
      ranks.run("program: fits", on_any({{"DEVICES", GENERATE(as<std::string>{}, "2", "auto")}}),
                {python.empty() ? ".venv/bin/python" : python, "-m", "torch.distributed.run",
                 "--no-python", "--nproc-per-node=2", "--master-port=" + free_port()});
  INFO(ended.output);
  CHECK(ended.status == 0);
  CHECK(ended.still_running == 0);
  CHECK(noted(ranks, "rank0") == "0 0 2 1 2");
  CHECK(noted(ranks, "rank1") == "1 1 2 0 2");
}

TEST_CASE("a program joins the ranks that srun, mpirun or a user started", "[ranks]") {
  const auto port = free_port();
  const auto lines = GENERATE(values<std::vector<std::string>>({
      {"SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2 SLURM_NNODES=1 SLURM_PROCID=0 SLURM_LOCALID=0 "
       "SLURM_NODEID=0 SLURM_NODELIST=localhost",
       "SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2 SLURM_NNODES=1 SLURM_PROCID=1 SLURM_LOCALID=1 "
       "SLURM_NODEID=0 SLURM_NODELIST=localhost"},
      {"OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_SIZE=2 OMPI_COMM_WORLD_RANK=0 "
       "OMPI_COMM_WORLD_LOCAL_RANK=0",
       "OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_SIZE=2 OMPI_COMM_WORLD_RANK=1 "
       "OMPI_COMM_WORLD_LOCAL_RANK=1"},
      {"LOCAL_RANK=0", "LOCAL_RANK=1 WORLD_SIZE=2"},
  }));
  Ranks ranks;
  const auto ended = ranks.run("program: fits", {{"MASTER_PORT", port}}, by_hand(lines));
  INFO(ended.output);
  CHECK(ended.status == 0);
  CHECK(ended.still_running == 0);
  CHECK(noted(ranks, "rank0") == "0 0 2 1 2");
  CHECK(noted(ranks, "rank1") == "1 1 2 0 2");
}

TEST_CASE("a program started once on each node starts the ranks of its node", "[ranks]") {
  Ranks ranks;
  const auto ended = ranks.run(
      "program: fits", {{"MASTER_PORT", free_port()}, {"MASTER_ADDR", "127.0.0.1"}, {"NODES", "2"}},
      by_hand({"NODE_RANK=0", "NODE_RANK=1"}));
  INFO(ended.output);
  CHECK(ended.status == 0);
  CHECK(ended.still_running == 0);
  CHECK(noted(ranks, "rank0") == "0 0 4 1 1");
  CHECK(noted(ranks, "rank1") == "1 1 4 0 1");
  CHECK(noted(ranks, "rank2") == "2 0 4 0 1");
  CHECK(noted(ranks, "rank3") == "3 1 4 0 1");
}

TEST_CASE("the end of a rank on another node ends all nodes", "[ranks]") {
  Ranks ranks;
  const auto ended = ranks.run("program: one rank does something else",
                               {{"MASTER_PORT", free_port()},
                                {"MASTER_ADDR", "127.0.0.1"},
                                {"NODES", "2"},
                                {"WHO", GENERATE(as<std::string>{}, "0", "2", "3")},
                                {"WHAT", "killed in forward"}},
                               by_hand({"NODE_RANK=0", "NODE_RANK=1"}));
  INFO(ended.output);
  CHECK(ended.status != 0);
  CHECK(ended.status != -1);
  CHECK(ended.still_running == 0);
  CHECK_THAT(ended.output, Contains("Rank ") && Contains("All processes of the run end."));
}

// ---- Waiting, collectives -----------------------------------------------------------------------

TEST_CASE("program: waits long for rank 0", "[.program]") {
  struct Slow : BoringModule {
    void prepare_data() override {
      std::this_thread::sleep_for(std::chrono::seconds(4));
      note("prepared", str(global_rank()));
    }
    void setup(Stage) override {
      rank_zero_first(trainer().strategy(), [&] {
        if (global_rank() == 0) std::this_thread::sleep_for(std::chrono::seconds(3));
        std::ofstream(Ranks::folder() + "/order", std::ios::app) << global_rank();
      });
    }
  };
  Trainer trainer(options().strategy(DDPStrategyOptions().timeout(std::string("00:00:00:02"))));
  trainer.fit(std::make_shared<Slow>());
}

TEST_CASE("prepare_data and rank_zero_first may take longer than a collective", "[ranks]") {
  Ranks ranks;
  const auto ended = ranks.run("program: waits long for rank 0");
  INFO(ended.output);
  CHECK(ended.status == 0);
  CHECK(noted(ranks, "prepared") == "0");
  CHECK(noted(ranks, "order") == "01");
}

TEST_CASE("program: is held up in a collective", "[.program]") {
  Trainer trainer(options().strategy(DDPStrategyOptions().timeout(std::string("00:00:00:01"))));
  auto module = std::make_shared<BoringModule>();
  module->before_training_step = [&](BoringModule&, int64_t batch_idx) {
    if (batch_idx == 1 && trainer.global_rank() == 1) {
      std::this_thread::sleep_for(std::chrono::seconds(20));
    }
  };
  trainer.fit(module);
}

TEST_CASE("a collective that takes longer than the timeout ends the run", "[ranks]") {
  Ranks ranks;
  const auto ended = ranks.run("program: is held up in a collective");
  INFO(ended.output);
  CHECK(ended.status == 1);
  CHECK(ended.still_running == 0);
  CHECK_THAT(ended.output, Contains("Rank 0 of 2") && Contains("1000ms"));
}

TEST_CASE("program: calls every collective", "[.program]") {
  Trainer trainer(options());
  auto module = std::make_shared<BoringModule>();
  std::string found;
  const auto check = [&](bool right, const char* what) {
    if (!right) found += str(what, " is wrong. ");
  };
  module->before_training_step = [&](BoringModule& m, int64_t batch_idx) {
    if (batch_idx > 0) return;
    auto& all = m.trainer().strategy();
    const auto rank = all.global_rank();
    const auto here = [&](const at::Tensor& tensor) { return tensor.to(all.root_device()); };
    const auto mine = here(at::tensor({static_cast<double>(rank + 1), 5.0}));
    const auto equal = [&](const at::Tensor& is, const at::Tensor& should) {
      return is.device().type() == all.root_device().type() && at::equal(is.cpu(), should);
    };
    check(equal(all.reduce(mine, ReduceOp::kSum), at::tensor({3.0, 10.0})), "sum");
    check(equal(all.reduce(mine, ReduceOp::kMean), at::tensor({1.5, 5.0})), "mean");
    check(equal(all.reduce(mine, ReduceOp::kMin), at::tensor({1.0, 5.0})), "min");
    check(equal(all.reduce(mine, ReduceOp::kMax), at::tensor({2.0, 5.0})), "max");
    check(mine[0].item<double>() == static_cast<double>(rank + 1), "the argument");
    check(equal(all.reduce(here(at::tensor({rank})), ReduceOp::kMean), at::tensor({int64_t{0}})),
          "mean of whole numbers");
    check(equal(all.reduce(mine.to(at::kBFloat16), ReduceOp::kSum),
                at::tensor({3.0, 10.0}).to(at::kBFloat16)),
          "sum in bfloat16");
    const auto half = here(at::tensor({rank == 0 ? 1 : 0, 1}).to(at::kBool));
    check(equal(all.reduce(half, ReduceOp::kMin), at::tensor({0, 1}).to(at::kBool)),
          "min of bools");
    check(equal(all.all_gather(half), at::tensor({1, 1, 0, 1}).to(at::kBool).reshape({2, 2})),
          "gather of bools");
    check(equal(all.reduce(mine.to(at::kHalf), ReduceOp::kMean),
                at::tensor({1.5, 5.0}).to(at::kHalf)),
          "mean in float16");
    check(equal(all.all_gather(mine), at::tensor({1.0, 5.0, 2.0, 5.0}).reshape({2, 2})), "gather");
    check(equal(all.all_gather(here(at::scalar_tensor(rank))), at::tensor({0.0f, 1.0f})),
          "gather of scalars");
    check(equal(all.all_gather_rows(here(at::full({rank + 1, 2}, rank))),
                at::tensor({0.0f, 0.0f, 1.0f, 1.0f, 1.0f, 1.0f}).reshape({3, 2})),
          "gather of rows");
    check(equal(all.all_gather_rows(here(rank == 0 ? at::empty({0}) : at::ones({1, 2}))),
                at::ones({1, 2})),
          "gather of no rows");
    auto tree = State::dict({{"text", "rank 0's"},
                             {"list", State::List{1, 2.5, true, State()}},
                             {"tensor", at::arange(3)}});
    tree[int64_t{7}] = State::Tuple{{State("a")}};
    const auto got = all.broadcast(rank == 0 ? tree : State("another"));
    check(got.repr() == tree.repr() && at::equal(got.at("tensor").as_tensor(), at::arange(3)),
          "broadcast");
    check(all.broadcast(State(rank), 1).as_int() == 1, "broadcast from rank 1");
    const auto values = all.all_gather_states(State(str("I am ", rank)));
    check(values[0].as_string() == "I am 0" && values[1].as_string() == "I am 1", "states");
    check(all.reduce_any(rank == 1) && !all.reduce_any(false), "reduce_any");
    check(!all.reduce_all(rank == 1) && all.reduce_all(true), "reduce_all");
    all.barrier();
  };
  trainer.fit(module);
  note(str("found", trainer.global_rank()), found);
  CHECK(found.empty());
}

TEST_CASE("collectives give every rank the same", "[ranks]") {
  Ranks ranks;
  const auto ended = ranks.run("program: calls every collective", on_any());
  INFO(ended.output);
  CHECK(ended.status == 0);
}

// ---- Errors before training ---------------------------------------------------------------------

TEST_CASE("a world that contradicts the flags is an error of every rank", "[ranks]") {
  struct Case {
    Variables variables;
    std::string error;
  };
  const auto [variables, error] = GENERATE(values<Case>({
      {{{"TORCHELASTIC_RUN_ID", "x"}, {"WORLD_SIZE", "4"}, {"RANK", "0"}, {"LOCAL_RANK", "0"}},
       "Trainer got devices=2 and num_nodes=1, which makes 2 processes, but "
       "TorchElasticEnvironment says that there are 4 (WORLD_SIZE)"},
      {{{"TORCHELASTIC_RUN_ID", "x"}, {"WORLD_SIZE", "2"}, {"LOCAL_RANK", "0"}},
       "TorchElasticEnvironment reads RANK from the environment, which is not set"},
      {{{"TORCHELASTIC_RUN_ID", "x"}, {"WORLD_SIZE", "two"}, {"LOCAL_RANK", "0"}},
       "WORLD_SIZE from the environment, which is \"two\", expected a whole number"},
      {{{"TORCHELASTIC_RUN_ID", "x"}, {"LOCAL_WORLD_SIZE", "2"}, {"DEVICES", "1"}},
       "2 processes were started on this node. Give devices=2"},
      {{{"SLURM_NTASKS", "4"},
        {"SLURM_PROCID", "0"},
        {"SLURM_LOCALID", "0"},
        {"SLURM_NODEID", "0"},
        {"SLURM_NTASKS_PER_NODE", "4"}},
       "Trainer got devices=2, but SLURM was asked for --ntasks-per-node=4. Give devices=4"},
      {{{"SLURM_NTASKS", "2"},
        {"SLURM_PROCID", "0"},
        {"SLURM_LOCALID", "0"},
        {"SLURM_NODEID", "0"}},
       "SLURM was asked for --ntasks=2 without saying how many a node has"},
      {{{"LOCAL_RANK", "5"}}, "the local rank 5, but Trainer got devices=2"},
      {{{"LOCAL_RANK", "0"}, {"WORLD_SIZE", "3"}}, "says that there are 3 (WORLD_SIZE)"},
      {{{"NODES", "2"}}, "Trainer got num_nodes=2, but MASTER_ADDR is not set"},
      {{{"MASTER_PORT", "70000"}}, "expected a port from 1 to 65535"},
      {{{"STRATEGY", "single_device"}}, "with a strategy that works on one device"},
  }));
  Ranks ranks;
  const auto ended = ranks.run("program: fits", variables);
  INFO(ended.output);
  CHECK(ended.status == 1);
  CHECK(ended.still_running == 0);
  CHECK_THAT(ended.output, Contains(error));
}
