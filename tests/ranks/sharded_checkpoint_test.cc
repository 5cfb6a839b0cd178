// Folders that all ranks write, in the background and not, on disks that are slow or full and in
// processes that are killed.
#include "strategies/sharded_checkpoint.h"

#include <sys/wait.h>
#include <torch/torch.h>
#include <unistd.h>

#include <atomic>
#include <catch2/catch.hpp>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <set>
#include <thread>

#include "lightning.h"
#include "lightning/checkpoint/async_io.h"
#include "lightning/checkpoint/dcp.h"
#include "lightning/checkpoint/torch_file.h"
#include "lightning/checkpoint/unfinished_folder.h"
#include "lightning/errors.h"
#include "lightning/version.h"
#include "strategies/fsdp.h"
#include "tests/param/live_bytes.h"
#include "tests/support/learner.h"
#include "tests/support/python.h"
#include "tests/support/ranks.h"
#include "tests/support/slow_disk.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;
namespace fs = std::filesystem;

namespace {

// The state as a checkpoint of step `step` has it, with an optimizer that goes by names.
State checkpoint_of(int64_t step) {
  const auto weight = at::full({5, 3}, static_cast<double>(step));
  const auto group = State::dict({{"lr", 0.1}, {"params", State::List{"weight"}}});
  return State::dict(
      {{"epoch", 0},
       {"global_step", step},
       {"pytorch-lightning_version", kPythonLightningVersion},
       {"state_dict", State::ordered_dict({{"weight", weight}})},
       {"optimizer_states",
        State::List{State::dict({{"state", State::dict({{"weight", State::dict({{"m", weight}})}})},
                                 {"param_groups", State::List{group}}})}}});
}

State load(const std::string& path) { return default_checkpoint_io()->load(path); }

void save_alone(int64_t step, const std::string& path) {
  Collectives alone;
  plan_sharded_save(checkpoint_of(step), path, "model", alone, SideChannel())();
}

int64_t step_of(const std::string& path) {
  const auto state = load(path);
  const auto step = state.at("global_step").as_int();
  CHECK(at::equal(state.at("state_dict").at("weight").as_tensor(),
                  at::full({5, 3}, static_cast<double>(step))));
  return step;
}

// Ends this process, as kill -9 does, at the call of that number.
void die_at(int64_t number) {
  disk().before = [number, count = std::make_shared<std::atomic<int64_t>>(0)](const char*) {
    if (++*count == number) ::kill(::getpid(), SIGKILL);
    return 0;
  };
}

}  // namespace

TEST_CASE("a save in shards that is killed anywhere leaves the checkpoint before it or its own",
          "[checkpoint]") {
  const bool replaces = GENERATE(false, true);
  CAPTURE(replaces);
  int64_t deaths = 0, old_left = 0, new_there = 0;
  for (bool ended = false; !ended;) {
    const TempDir dir;
    const auto path = dir.path("step");
    if (replaces) save_alone(1, path);
    const pid_t child = ::fork();
    if (child == 0) {
      die_at(deaths + 1);
      save_alone(2, path);
      ::_exit(7);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    ended = WIFEXITED(status);
    if (ended) CHECK(WEXITSTATUS(status) == 7);
    CAPTURE(deaths);
    if (!replaces && !fs::exists(path)) {
      ++old_left;
    } else {
      const auto step = step_of(path);
      CHECK((step == 2 || (step == 1 && replaces && !ended)));
      ++(step == 2 ? new_there : old_left);
    }
    save_alone(3, path);  // what was left is in nobody's way
    CHECK(step_of(path) == 3);
    CHECK_FALSE(fs::exists(path + ".unfinished"));
    deaths += ended ? 0 : 1;
  }
  // The rank's file, its values and the metadata are each synced, named and their folder synced.
  CHECK(deaths >= 10);
  CHECK(old_left >= 9);
  CHECK(new_there >= 2);
}

TEST_CASE("a save in shards to a full disk says so and leaves what was there", "[checkpoint]") {
  const TempDir dir;
  save_alone(1, dir.path("step"));
  for (int64_t at = 1; at < 10; ++at) {
    CAPTURE(at);
    int64_t calls = 0;
    disk().before = [&](const char*) { return ++calls == at ? ENOSPC : 0; };
    CHECK_THROWS_WITH(save_alone(2, dir.path("step")),
                      Contains("was not saved. ") && Contains("No space left"));
    disk().before = nullptr;
    CHECK(step_of(dir.path("step")) == 1);
    CHECK_FALSE(fs::exists(dir.path("step.unfinished")));
  }
}

// ---- What a rank reads --------------------------------------------------------------------------

namespace {

// Bytes of the file that this process has touched.
int64_t touched(const std::string& path) {
  std::ifstream maps("/proc/self/smaps");
  int64_t kilobytes = 0;
  bool is_it = false;
  for (std::string line; std::getline(maps, line);) {
    if (line.find('-') < line.find(' ')) is_it = line.find(path) != std::string::npos;
    if (is_it && line.rfind("Rss:", 0) == 0) kilobytes += std::stoll(line.substr(4));
  }
  return kilobytes * 1024;
}

struct Rank : Collectives {
  explicit Rank(int64_t rank) : rank(rank) {}
  int64_t world_size() const override { return 2; }
  int64_t global_rank() const override { return rank; }
  int64_t rank;
};

constexpr int64_t kSide = 1024, kHalf = kSide / 2, kBytes = kSide * kSide * 4;

at::Tensor numbers() { return at::arange(kSide * kSide, at::kFloat).view({kSide, kSide}); }

// A weight and what an optimizer has for it, of which each rank has half the rows.
State half_of_a_run(int64_t rank) {
  TensorState half;
  half.sizes = {kSide, kSide};
  half.chunks.push_back(
      {{rank * kHalf, 0}, {kHalf, kSide}, numbers().narrow(0, rank * kHalf, kHalf)});
  const auto state = State::dict({{"weight", State::dict({{"exp_avg", half}})}});
  const auto group = State::dict({{"params", State::List{"weight"}}});
  return State::dict(
      {{"model", State::dict({{"weight", half}})},
       {"optimizer_0", State::dict({{"state", state}, {"param_groups", State::List{group}}})}});
}

void save_two_halves(const std::string& folder) {
  auto items = write_dcp_rank(half_of_a_run(0), folder, 0);
  for (auto& item : write_dcp_rank(half_of_a_run(1), folder, 1)) items.push_back(std::move(item));
  write_dcp_metadata(items, folder);
}

void check_second_half(const State& tensor) {
  const auto& chunks = tensor.as_tensor_state().chunks;
  REQUIRE(chunks.size() == 1);
  CHECK(chunks[0].offsets == std::vector<int64_t>{kHalf, 0});
  CHECK(at::equal(chunks[0].tensor, numbers().narrow(0, kHalf, kHalf)));
}

}  // namespace

TEST_CASE("a rank touches of a folder's files what its rows need", "[checkpoint]") {
  const TempDir dir;
  save_two_halves(dir.path("run"));
  const auto state = load_sharded_checkpoint(dir.path("run"), {1, 2});
  check_second_half(state.at("state_dict").at("weight"));
  const auto& optimizer = state.at("optimizer_states").as_list().at(0);
  check_second_half(optimizer.at("state").at(0).at("exp_avg"));
  CHECK(touched(dir.path("run/__0_0.distcp")) < kBytes / 8);
  CHECK(touched(dir.path("run/__1_0.distcp")) >= kBytes);
}

TEST_CASE("a rank copies of a folder of Python's, which cannot be mapped, its rows alone",
          "[checkpoint][python]") {
  const TempDir dir;
  run_python(R"(
import sys, torch
import torch.distributed.checkpoint as dcp
weight = torch.arange(1024 * 1024, dtype=torch.float32).view(1024, 1024)
dcp.save({"model": {"weight": weight},
          "optimizer_0": {"state": {"weight": {"exp_avg": weight.clone()}},
                          "param_groups": [{"params": ["weight"], "x": 1.0}]}},
         checkpoint_id=sys.argv[1])
)",
             {dir.path("run")});
  const auto before = LiveBytes::now();
  LiveBytes::take_peak();
  const auto state = load_sharded_checkpoint(dir.path("run"), {1, 2});
  CHECK(LiveBytes::take_peak() - before <= kBytes + kBytes / 8);  // of two tensors the half
  CHECK(LiveBytes::now() - before >= kBytes / 2);                 // that the counter counts
  const auto& chunk = state.at("state_dict").at("weight").as_tensor_state().chunks.at(0);
  CHECK(at::equal(chunk.tensor.narrow(0, chunk.tensor.size(0) - kHalf, kHalf),
                  numbers().narrow(0, kHalf, kHalf)));
}

namespace {

// Values that three ranks wrote: a box of the second of two ranks meets the parts of two of them.
// Of 1.5 million floats a part is more than one thread takes at once.
constexpr int64_t kColumns = 500'000;

TensorState third_of(const at::Tensor& whole, int64_t rank) {
  TensorState part;
  part.sizes = whole.sizes().vec();
  auto rows = whole.narrow(0, 3 * rank, 3);
  std::vector<int64_t> offsets(part.sizes.size(), 0);
  offsets[0] = 3 * rank;
  part.chunks.push_back({offsets, rows.sizes().vec(), rows});
  return part;
}

State third_of_a_run(const at::Tensor& big, const at::Tensor& small, int64_t rank) {
  const State of_big = third_of(big, rank), of_small = third_of(small, rank);
  const auto state = State::dict({{"small", State::dict({{"exp_avg", of_small}})},
                                  {"big", State::dict({{"exp_avg", of_big}})}});
  const auto group = State::dict({{"params", State::List{"small", "big"}}});
  return State::dict(
      {{"model", State::dict({{"small", of_small}, {"big", of_big}})},
       {"optimizer_0", State::dict({{"state", state}, {"param_groups", State::List{group}}})}});
}

// Where in an item of three floats, which begin with `first`, these lie.
uint64_t numbers_in(const std::string& path, const DcpMetadata::Place& place, float first) {
  std::string item(place.bytes, ' ');
  std::ifstream(path, std::ios::binary)
      .seekg(static_cast<std::streamoff>(place.offset))
      .read(item.data(), static_cast<std::streamsize>(item.size()));
  const float numbers[] = {first, first + 1, first + 2};
  const auto begin = item.find(std::string(reinterpret_cast<const char*>(numbers), 12));
  REQUIRE(begin != std::string::npos);
  return begin;
}

// Changes the byte of a file while it lives.
struct Flip {
  Flip(std::string path, uint64_t at) : path(std::move(path)), at(at) { flip(); }
  ~Flip() { flip(); }
  void flip() const {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    const auto place = static_cast<std::streamoff>(at);
    const auto byte = file.seekg(place).get();
    file.seekp(place).put(static_cast<char>(byte ^ 16)).flush();
  }
  std::string path;
  uint64_t at;
};

}  // namespace

TEST_CASE("a bit that is flipped anywhere in what a rank needs is an error with the tensor's name",
          "[checkpoint]") {
  const TempDir dir;
  const auto folder = dir.path("run");
  const auto big = at::arange(9 * kColumns, at::kFloat).view({9, kColumns});
  const auto small = at::arange(9, at::kFloat);
  std::vector<DcpMetadata::Item> items;
  for (int64_t rank = 0; rank < 3; ++rank) {
    for (auto& item : write_dcp_rank(third_of_a_run(big, small, rank), folder, rank)) {
      items.push_back(std::move(item));
    }
  }
  write_dcp_metadata(items, folder);
  const auto load_it = [&] { return load_sharded_checkpoint(folder, {1, 2}); };  // rows 5 to 8
  const auto loaded = load_it().at("state_dict").at("big").as_tensor_state().chunks;
  REQUIRE(loaded.size() == 2);
  CHECK(at::equal(loaded[1].tensor, big.narrow(0, 6, 3)));

  const auto metadata = DcpReader(folder).metadata();
  for (const std::string name : {"model.big", "optimizer_0.state.big.exp_avg", "model.small",
                                 "optimizer_0.state.small.exp_avg"}) {
    for (size_t chunk = 0; chunk < 3; ++chunk) {
      for (const double part : {0.3, 0.5, 0.9}) {
        CAPTURE(name, chunk, part);
        const auto& place = metadata.find(name)->chunks[chunk].place;
        // The numbers take most of a big item; of a small one other bytes do.
        const bool is_big = name.find("big") != std::string::npos;
        const auto size = static_cast<double>(is_big ? place.bytes : 12);
        const auto begin = is_big ? 0 : numbers_in(folder + "/" + place.file, place, 3.0F * chunk);
        const Flip flip(folder + "/" + place.file,
                        place.offset + begin + static_cast<uint64_t>(part * size));
        if (chunk == 0) {
          CHECK_NOTHROW(load_it());  // is not looked at
        } else {
          CHECK_THROWS_WITH(
              load_it(), Contains("\"" + name + "\"") && Contains("CRC") && Contains(place.file));
        }
      }
    }
  }
  const auto file = folder + "/__2_0.distcp";
  fs::resize_file(file, fs::file_size(file) - 1);
  CHECK_THROWS_WITH(load_it(), Contains("__2_0.distcp") && Contains("was not copied whole"));
}

TEST_CASE("a rank maps a file, reads a share of it, and finds what is broken in that",
          "[checkpoint]") {
  const TempDir dir;
  const auto path = dir.path("run.ckpt");
  auto weights = State::ordered_dict();
  for (int64_t i = 0; i < 8; ++i) weights[str("weight", i)] = at::full({kSide, kSide}, double(i));
  write_torch_file(State::dict({{"epoch", 1},
                                {"global_step", 2},
                                {"pytorch-lightning_version", kPythonLightningVersion},
                                {"state_dict", weights}}),
                   path);
  {
    const auto before = LiveBytes::now();
    LiveBytes::take_peak();
    const auto state = load_file_in_shares(path, Rank(1));
    CHECK(LiveBytes::take_peak() - before < kBytes / 8);
    CHECK(touched(path) < 5 * kBytes);
    const auto rows = state.at("state_dict").at("weight3").as_tensor().narrow(0, kHalf, kHalf);
    CHECK(rows.sum().item<double>() == 3.0 * kHalf * kSide);
  }
  for (int64_t i = 0; i < 8; ++i) {
    CAPTURE(i);
    const auto at = 4096 + i * kBytes;
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    const auto byte = static_cast<char>(file.seekg(at).get());
    file.seekp(at).put(static_cast<char>(byte ^ 8)).flush();
    int64_t found = 0;
    for (int64_t rank = 0; rank < 2; ++rank) {
      try {
        load_file_in_shares(path, Rank(rank));
      } catch (const CheckpointError& error) {
        CHECK_THAT(error.what(), Contains("CRC"));
        ++found;
      }
    }
    CHECK(found == 1);
    file.seekp(at).put(byte).flush();
  }
}

// ---- Beside training ----------------------------------------------------------------------------

namespace {

TrainerOptions options(bool background) {
  auto made = TrainerOptions()
                  .accelerator(Ranks::accelerator())
                  .devices(2)
                  .strategy(FSDPStrategyOptions().state_dict_type("sharded"))
                  .max_epochs(2)
                  .logger(false)
                  .enable_progress_bar(false)
                  .enable_model_summary(false)
                  .enable_checkpointing(false)
                  .default_root_dir(Ranks::folder());
  if (background) made.plugins({Plugin(std::make_shared<AsyncCheckpointIO>())});
  return made;
}

DataLoader rows() { return DataLoader(TensorDataset(Batch(noise(24, 3))), DataLoaderOptions(3)); }

// Four batches an epoch on two ranks.
struct Small : LightningModule {
  Small() {
    torch::manual_seed(1);
    first = register_module("first", torch::nn::Linear(8, 7));
    last = register_module("last", torch::nn::Linear(7, 8));
  }
  StepOutput training_step(const Batch& batch, int64_t) override {
    const auto loss = (last(torch::gelu(first(batch.tensor()))) - batch.tensor()).square().mean();
    losses.push_back(loss.detach());
    return loss;
  }
  void on_train_batch_end(const StepOutput&, const Batch&, int64_t) override {
    if (after_step) after_step(global_step());
  }
  Optimizers configure_optimizers() override {
    return torch::optim::AdamW(parameters(), torch::optim::AdamWOptions(0.02));
  }
  torch::nn::Linear first{nullptr}, last{nullptr};
  std::function<void(int64_t step)> after_step;
  std::vector<at::Tensor> losses;
};

void wait_for_save(Trainer& trainer) {
  auto* const io = dynamic_cast<AsyncCheckpointIO*>(&trainer.strategy().checkpoint_io());
  if (io != nullptr) io->wait();
}

std::string in_folder(const std::string& name) { return Ranks::folder() + "/" + name; }

// This rank's rows of each parameter.
std::map<std::string, TensorState::Chunk> rows_of(Trainer& trainer, const Small& module) {
  std::map<std::string, TensorState::Chunk> chunks;
  const auto state = trainer.strategy().model_state(module);
  for (const auto& [name, value] : state.as_dict()) {
    const auto& own = value.as_tensor_state().chunks;
    if (own.empty()) continue;
    chunks[to_string(name)] = own[0];
    chunks[to_string(name)].tensor = own[0].tensor.to(at::kCPU, own[0].tensor.scalar_type(),
                                                      /*non_blocking=*/false, /*copy=*/true);
  }
  return chunks;
}

}  // namespace

TEST_CASE("program: trains while its disk is slow", "[.program]") {
  std::atomic<bool> is_slow{false};
  std::atomic<int64_t> waiting{0};
  disk().before = [&](const char*) {
    waiting += is_slow ? 1 : 0;
    while (is_slow) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    return 0;
  };
  Trainer trainer(options(true));
  auto module = std::make_shared<Small>();
  std::map<std::string, TensorState::Chunk> saved;
  module->after_step = [&](int64_t step) {
    if (step == 2) {
      is_slow = true;
      trainer.save_checkpoint(in_folder("early"));
      saved = rows_of(trainer, *module);
    }
    if (step != 6) return;
    while (waiting == 0) std::this_thread::yield();  // it has come as far as the disk
    CHECK_FALSE(fs::exists(in_folder("early")));
    auto& io = dynamic_cast<AsyncCheckpointIO&>(trainer.strategy().checkpoint_io());
    CHECK(io.will_exist(in_folder("early")) == true);
    is_slow = false;
  };
  trainer.fit(module, rows());
  const auto loaded = load(in_folder("early"));
  CHECK(loaded.at("global_step").as_int() == 2);
  const auto now = rows_of(trainer, *module);
  REQUIRE(saved.size() == 4);
  for (const auto& [name, chunk] : saved) {
    INFO(name);
    const auto file =
        loaded.at("state_dict").at(name).as_tensor().narrow(0, chunk.offsets[0], chunk.sizes[0]);
    CHECK(at::equal(file, chunk.tensor));
    CHECK_FALSE(at::equal(file, now.at(name).tensor));
  }
}

TEST_CASE("a save in the background holds all ranks' state of its moment", "[ranks]") {
  Ranks ranks;
  const auto ended = ranks.run("program: trains while its disk is slow");
  INFO(ended.output);
  CHECK(ended.status == 0);
}

TEST_CASE("program: keeps checkpoints in shards", "[.program]") {
  const bool background = Ranks::variable("BACKGROUND") == "yes";
  auto keeps =
      std::make_shared<ModelCheckpoint>(ModelCheckpointOptions()
                                            .dirpath(in_folder(background ? "behind" : "before"))
                                            .every_n_train_steps(1)
                                            .save_top_k(2)
                                            .monitor("step")
                                            .mode("max")
                                            .save_last("link"));
  Trainer trainer(options(background).enable_checkpointing(true).callbacks({keeps}));
  auto module = std::make_shared<Small>();
  trainer.fit(module, rows());
}

TEST_CASE("checkpoints saved in the background are those saved before training goes on",
          "[ranks]") {
  Ranks ranks;
  for (const char* background : {"yes", "no"}) {
    const auto ended =
        ranks.run("program: keeps checkpoints in shards", {{"BACKGROUND", background}});
    INFO(ended.output);
    REQUIRE(ended.status == 0);
  }
  const auto names = [&](const char* folder) {
    std::set<std::string> found;
    for (const auto& entry : fs::directory_iterator(ranks.dir().path(folder))) {
      found.insert(entry.path().filename().string());
    }
    return found;
  };
  CHECK(names("behind") ==
        std::set<std::string>{"epoch=1-step=7.ckpt", "epoch=1-step=8.ckpt", "last.ckpt"});
  CHECK(names("before") == names("behind"));
  for (const auto& name : names("behind")) {
    INFO(name);
    auto one = load(ranks.dir().path("behind/" + name));
    auto other = load(ranks.dir().path("before/" + name));
    for (auto* state : {&one, &other}) state->as_dict().erase("callbacks");  // has paths
    CHECK(differences(leaves_of(one), leaves_of(other)) == "");
  }
}

TEST_CASE("program: saves to a disk that is full on one rank", "[.program]") {
  const bool background = Ranks::variable("BACKGROUND") == "yes";
  std::atomic<bool> is_full{false};
  disk().before = [&](const char*) { return is_full ? ENOSPC : 0; };
  Trainer trainer(options(background));
  const auto fill = [&](bool full) { is_full = full && trainer.global_rank() == 1; };
  const auto save = [&](const char* name) { trainer.save_checkpoint(in_folder(name)); };
  const auto says = Contains("step was not saved. On rank 1: Cannot write the checkpoint");
  auto module = std::make_shared<Small>();
  module->after_step = [&](int64_t step) {
    if (step == 1) save("step");
    if (step == 2) {
      wait_for_save(trainer);
      fill(true);
      if (background) save("step");
      if (!background) CHECK_THROWS_WITH(save("step"), says);
    }
    if (step == 5) {  // nothing was thrown meanwhile
      wait_for_save(trainer);
      fill(false);
      if (background) CHECK_THROWS_WITH(save("other"), says);
      if (!background) save("other");
    }
    if (step == 8 && background) {
      wait_for_save(trainer);
      fill(true);
      save("step");
    }
  };
  if (background) CHECK_THROWS_WITH(trainer.fit(module, rows()), says);
  if (!background) trainer.fit(module, rows());
  CHECK(module->losses.size() == 8);
  CHECK(load(in_folder("step")).at("global_step").as_int() == 1);
  CHECK(load(in_folder("other")).at("global_step").as_int() == 5);
}

TEST_CASE("what keeps one rank from saving is an error on all, and the checkpoint before stays",
          "[ranks]") {
  const char* background = GENERATE("yes", "no");
  CAPTURE(background);
  Ranks ranks;
  const auto ended =
      ranks.run("program: saves to a disk that is full on one rank", {{"BACKGROUND", background}});
  INFO(ended.output);
  CHECK(ended.status == 0);
  CHECK(ended.still_running == 0);
}

// ---- Faults -------------------------------------------------------------------------------------

namespace {

// Does something at a moment of its fourth step, or while it is loaded.
struct Dying : Small {
  explicit Dying(std::string moment) : moment(std::move(moment)) {}
  StepOutput training_step(const Batch& batch, int64_t batch_idx) override {
    const bool is_time = global_step() == 3;
    if (is_time && moment == "forward") die();
    auto output = Small::training_step(batch, batch_idx);
    if (is_time && moment == "backward") {
      output.loss().register_hook([this](const at::Tensor&) { die(); });
    }
    return output;
  }
  void on_load_checkpoint(State&) override {
    if (moment == "load") die();
  }
  std::string moment;
  std::function<void()> die;
};

}  // namespace

TEST_CASE("program: loses a rank", "[.program]") {
  const auto moment = Ranks::variable("MOMENT");
  Trainer trainer(options(Ranks::variable("BACKGROUND") == "yes"));
  const bool dies = str(trainer.global_rank()) == Ranks::variable("DIES");
  auto module = std::make_shared<Dying>(moment);
  module->die = [&] {
    if (dies) ::raise(SIGKILL);
  };
  module->after_step = [&](int64_t step) {
    const bool overwrites = step == 3 && moment == "save";
    if (overwrites) wait_for_save(trainer);
    if (overwrites && dies) die_at(std::stoll(Ranks::variable("AT")));
    if (step == 1 || overwrites) trainer.save_checkpoint(in_folder("step"));
  };
  RunArguments arguments;
  if (moment == "load") arguments.ckpt_path(in_folder("step"));
  trainer.fit(module, rows(), {}, arguments);
}

TEST_CASE("a rank that is killed under fsdp ends all, and the checkpoint before it loads",
          "[ranks]") {
  struct Case {
    const char *moment, *dies, *background;
    int64_t at;  // of the calls of a rank's save that reach the disk
  };
  const auto [moment, dies, background, at] = GENERATE(values<Case>({{"forward", "1", "no", 0},
                                                                     {"forward", "0", "no", 0},
                                                                     {"backward", "1", "no", 0},
                                                                     {"save", "1", "no", 1},
                                                                     {"save", "1", "yes", 2},
                                                                     {"save", "0", "no", 5},
                                                                     {"save", "0", "yes", 7},
                                                                     {"load", "1", "no", 0}}));
  CAPTURE(moment, dies, background, at);
  Ranks ranks;
  Variables variables{
      {"MOMENT", moment}, {"DIES", dies}, {"BACKGROUND", background}, {"AT", str(at)}};
  if (moment == std::string("load")) {
    auto sound = variables;
    sound["MOMENT"] = "nothing";
    const auto ended = ranks.run("program: loses a rank", sound);
    INFO(ended.output);
    REQUIRE(ended.status == 0);
  }
  const auto ended = ranks.run("program: loses a rank", variables);
  INFO(ended.output);
  CHECK(ended.status == (dies == std::string("0") ? 128 + SIGKILL : 1));
  CHECK(ended.still_running == 0);
  if (dies == std::string("1")) {
    CHECK_THAT(ended.output, Contains("Rank 1 of 2") &&
                                 Contains("ended with signal 9 (Killed) before the others"));
  }
  CHECK(load(ranks.dir().path("step")).at("global_step").as_int() == 1);
  const bool leaves_a_part = std::filesystem::exists(unfinished_folder(ranks.dir().path("step")));
  CHECK((leaves_a_part || moment != std::string("save")));
  if (background == std::string("no")) {
    CHECK(remove_unfinished_folders(ranks.dir().path()) == (leaves_a_part ? 1 : 0));
  }
  // The next run takes up from it, over what was left.
  variables["MOMENT"] = "nothing";
  const auto next = ranks.run("program: loses a rank", variables);
  INFO(next.output);
  CHECK(next.status == 0);
}
