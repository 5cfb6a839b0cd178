// Each rank's share of the data, what is logged of it, and what ranks decide together.
#include <signal.h>
#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>

#include "lightning.h"
#include "lightning/checkpoint/torch_file.h"
#include "lightning/log.h"
#include "tests/support/learner.h"
#include "tests/support/ranks.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;
namespace fs = std::filesystem;

namespace {

DataLoader numbers(int64_t size, DataLoaderOptions options = DataLoaderOptions(2)) {
  return DataLoader(TensorDataset(Batch(at::arange(size, at::kFloat).reshape({size, 1}))), options);
}

class Backwards : public Sampler {
 public:
  explicit Backwards(int64_t size) : size_(size) {}
  IndexStream iterate() override {
    return [left = size_]() mutable {
      return left > 0 ? std::optional<int64_t>(--left) : std::nullopt;
    };
  }
  std::optional<int64_t> size() const override { return size_; }

 private:
  int64_t size_;
};

// As in data.py.
struct Net : LightningModule {
  Net() : layer(register_module("layer", torch::nn::Linear(1, 1))) {}

  void see(const std::string& stage, const Batch& batch) {
    std::vector<int64_t> values;
    for (const auto& row : batch.tensor().unbind()) values.push_back(row.item<int64_t>());
    seen[stage].push_back(values);
  }
  StepOutput training_step(const Batch& batch, int64_t) override {
    see(str("train ", current_epoch()), batch);
    const auto value = batch.tensor().mean();
    const auto synced = LogOptions().sync_dist(true).on_epoch(true);
    log("mean", value, LogOptions(synced).on_step(true));
    log("largest", batch.tensor().max(), LogOptions(synced).on_step(false).reduce_fx("max"));
    log("sum", value, LogOptions(synced).on_step(false).reduce_fx("sum"));
    return layer(batch.tensor()).mean() * 0;
  }
  void on_train_batch_end(const StepOutput&, const Batch&, int64_t) override {
    if (const auto mean = trainer().metric("mean_step")) logged.push_back(*mean);
  }
  StepOutput validation_step(const Batch& batch, int64_t) override {
    if (!trainer().sanity_checking()) see("validate", batch);
    log("val", batch.tensor().mean(), LogOptions().sync_dist(true));
    log("own", batch.tensor().mean());
    return {};
  }
  StepOutput test_step(const Batch& batch, int64_t) override {
    see("test", batch);
    log("test", batch.tensor().mean(), LogOptions().sync_dist(true));
    return {};
  }
  Batch predict_step(const Batch& batch, int64_t) override {
    see("predict", batch);
    return batch;
  }
  Optimizers configure_optimizers() override { return torch::optim::SGD(parameters(), 0.1); }

  torch::nn::Linear layer;
  std::map<std::string, std::vector<std::vector<int64_t>>> seen;
  std::vector<double> logged;
};

TrainerOptions options() {
  return TrainerOptions()
      .accelerator(Ranks::accelerator())
      .devices(2)
      .max_epochs(2)
      .logger(false)
      .enable_checkpointing(false)
      .enable_progress_bar(false)
      .enable_model_summary(false)
      .default_root_dir(Ranks::folder());
}

Json metrics_of(const Trainer& trainer) {
  Json all;
  for (const auto& [name, value] : trainer.callback_metrics()) all[name] = value.item<double>();
  return all;
}

Json read_json(const std::string& path) {
  std::ifstream file(path);
  return Json::parse(file);
}

void write_json(const std::string& name, const Json& json) {
  std::ofstream(Ranks::folder() + "/" + name) << json;
}

// Numbers as they are after a way through text; keys in any order.
nlohmann::json plain(const Json& json) { return nlohmann::json::parse(json.dump()); }

// To the bit; over NCCL, which divides before it adds, within a rounding.
void check_same(const nlohmann::json& is, const nlohmann::json& should) {
  if (Ranks::on_cpu()) {
    CHECK(is.dump() == should.dump());
    return;
  }
  const auto one = is.flatten(), other = should.flatten();
  REQUIRE(one.size() == other.size());
  for (const auto& item : other.items()) {
    CAPTURE(item.key());
    const auto& value = one.at(item.key());
    if (item.value().is_number_float()) {
      CHECK(value.get<double>() == Approx(item.value().get<double>()).epsilon(1e-6));
    } else {
      CHECK(value == item.value());
    }
  }
}

}  // namespace

TEST_CASE("program: sees its share", "[.program]") {
  seed_everything(5, false, false);
  Json found;
  auto net = std::make_shared<Net>();
  Trainer fit(options());
  fit.fit(net, numbers(11), numbers(7));
  found["metrics"] = metrics_of(fit);
  fit.test(net, numbers(5, DataLoaderOptions(2).shuffle(true)), RunArguments().verbose(false));
  found["tested"] = metrics_of(fit);
  fit.predict(net, numbers(7));
  found["seen"] = net->seen;
  found["logged"] = net->logged;

  const auto seen_by = [](TrainerOptions flags, const DataLoader& loader) {
    auto other = std::make_shared<Net>();
    Trainer(std::move(flags)).fit(other, loader);
    return other->seen;
  };
  found["backwards"] =
      seen_by(options(), numbers(9, DataLoaderOptions(2).sampler(std::make_shared<Backwards>(9))));
  found["overfits"] = seen_by(options().overfit_batches(int64_t{2}),
                              numbers(9, DataLoaderOptions(2).shuffle(true).drop_last(true)));
  found["not shared"] = seen_by(options().use_distributed_sampler(false), numbers(5));
  write_json(str("rank", fit.global_rank(), ".json"), found);
}

TEST_CASE("two ranks see the samples and log the values that those of the original do", "[ranks]") {
  Ranks ranks;
  const auto ended = ranks.run("program: sees its share");
  INFO(ended.output);
  REQUIRE(ended.status == 0);
  const auto expected = read_json("tests/ranks/data.json").at("ranks");
  for (size_t rank = 0; rank < 2; ++rank) {
    const auto found = read_json(ranks.dir().path(str("rank", rank, ".json")));
    for (const auto& item : expected[rank].items()) {
      CAPTURE(rank, item.key());
      check_same(plain(found.at(item.key())), plain(item.value()));
    }
  }
}

// ---- What ranks decide together -----------------------------------------------------------------

namespace {

// Each rank logs another value, of its own.
struct Disagreeing : Net {
  StepOutput training_step(const Batch& batch, int64_t) override {
    return layer(batch.tensor()).mean();
  }
  StepOutput validation_step(const Batch&, int64_t) override { return {}; }
  void on_validation_epoch_end() override {
    static const std::vector<std::vector<double>> losses{{5, 4, 3, 2, 1}, {5, 6, 3, 7, 8}};
    const auto epoch = std::min<int64_t>(current_epoch(), 4);
    log("loss", losses[static_cast<size_t>(global_rank())][static_cast<size_t>(epoch)]);
  }
};

std::vector<std::string> checkpoints(const std::string& folder) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder)) {
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace

TEST_CASE("program: decides", "[.program]") {
  auto stopping = std::make_shared<EarlyStopping>(EarlyStoppingOptions("loss").patience(2));
  auto saving = std::make_shared<ModelCheckpoint>(ModelCheckpointOptions()
                                                      .dirpath(Ranks::folder() + "/saved")
                                                      .monitor("loss")
                                                      .filename("{epoch}"));
  Trainer trainer(options().max_epochs(5).enable_checkpointing(true).callbacks({stopping, saving}));
  trainer.fit(std::make_shared<Disagreeing>(), numbers(8), numbers(4));
  write_json(str("rank", trainer.global_rank(), ".json"),
             Json{{"epochs", trainer.current_epoch()},
                  {"best", fs::path(saving->best_model_path()).filename().string()}});
}

TEST_CASE("ranks that log different values stop together and save the same", "[ranks]") {
  Ranks ranks;
  const auto ended = ranks.run("program: decides");
  INFO(ended.output);
  REQUIRE(ended.status == 0);
  for (const char* name : {"rank0.json", "rank1.json"}) {
    const auto found = read_json(ranks.dir().path(name));
    CHECK(found.at("epochs") == 5);             // rank 1's patience ends all
    CHECK(found.at("best") == "epoch=2.ckpt");  // the last that was better on both
  }
  CHECK(checkpoints(ranks.dir().path("saved")) == std::vector<std::string>{"epoch=2.ckpt"});
}

TEST_CASE("program: reduces by a function", "[.program]") {
  struct Spread : Net {
    StepOutput training_step(const Batch& batch, int64_t) override {
      log("spread", static_cast<double>(global_rank()),
          LogOptions().on_step(false).on_epoch(true).sync_dist(true).reduce_fx(
              [](const at::Tensor& values) { return values.max() - values.min(); }));
      return layer(batch.tensor()).mean();
    }
  };
  Trainer trainer(options());
  trainer.fit(std::make_shared<Spread>(), numbers(8));
  write_json(str("rank", trainer.global_rank(), ".json"), Json(*trainer.metric("spread")));
}

TEST_CASE("a function that reduces a logged value is given those of all ranks", "[ranks]") {
  Ranks ranks;
  const auto ended = ranks.run("program: reduces by a function");
  INFO(ended.output);
  REQUIRE(ended.status == 0);
  for (const char* name : {"rank0.json", "rank1.json"}) {
    CHECK(read_json(ranks.dir().path(name)) == 1.0);
  }
}

TEST_CASE("program: logs everywhere", "[.program]") {
  struct Logging : Net {
    StepOutput training_step(const Batch& batch, int64_t) override {
      log("loss", batch.tensor().mean(), LogOptions().prog_bar(true));
      print(str("step of rank ", global_rank()));
      info(str("info of rank ", global_rank()));
      return layer(batch.tensor()).mean();
    }
  };
  Trainer trainer(options()
                      .log_every_n_steps(1)
                      .logger(CSVLoggerOptions().save_dir(Ranks::folder()).name("csv"))
                      .enable_progress_bar(true)
                      .enable_model_summary(true)
                      .enable_checkpointing(true));
  trainer.fit(std::make_shared<Logging>(), numbers(8), numbers(4));
  write_json(str("rank", trainer.global_rank(), ".json"), Json(trainer.log_dir()));
}

TEST_CASE("loggers, progress bars, summaries, lines and checkpoints are rank 0's", "[ranks]") {
  Ranks ranks;
  const auto ended = ranks.run("program: logs everywhere");
  INFO(ended.output);
  REQUIRE(ended.status == 0);
  CHECK_THAT(ended.output, Contains("step of rank 0") && Contains("info of rank 0"));
  CHECK_THAT(ended.output, !Contains("of rank 1"));
  const auto count = [&](const std::string& text) {
    int found = 0;
    for (size_t at = ended.output.find(text); at != std::string::npos;
         at = ended.output.find(text, at + 1)) {
      ++found;
    }
    return found;
  };
  CHECK(count("Total params") == 1);
  CHECK(count("`Trainer.fit` stopped") == 1);
  CHECK(checkpoints(ranks.dir().path("csv")) == std::vector<std::string>{"version_0"});
  const auto dir = ranks.dir().path("csv") + "/version_0";
  CHECK(read_json(ranks.dir().path("rank0.json")) == dir);
  CHECK(read_json(ranks.dir().path("rank1.json")) == dir);
  std::ifstream rows(dir + "/metrics.csv");
  std::string line;
  int lines = 0;
  while (std::getline(rows, line)) ++lines;
  CHECK(lines >= 5);  // a head, and four steps of one rank
  CHECK(lines < 12);
}

// ---- Resuming, ending ---------------------------------------------------------------------------

// Without its schedules, one of which looks at a value that each rank has for itself.
struct Unscheduled : Learner {
  Optimizers configure_optimizers() override { return torch::optim::AdamW(parameters(), 0.02); }
};

TEST_CASE("program: resumes", "[.program]") {
  const auto data = [] {
    return DataLoader(TensorDataset(Batch(noise(24, 1))), DataLoaderOptions(3).shuffle(true));
  };
  const auto val = [] { return DataLoader(TensorDataset(Batch(noise(8, 2))), 2); };
  const auto fit = [&](const std::string& from, const std::string& to) {
    auto saving = std::make_shared<ModelCheckpoint>(ModelCheckpointOptions()
                                                        .dirpath(Ranks::folder() + "/steps")
                                                        .filename("{step}")
                                                        .every_n_train_steps(3)
                                                        .save_top_k(-1));
    // A Learner adds random numbers of the host to its buffer.
    auto flags = options().accelerator("cpu").max_epochs(3).accumulate_grad_batches(2);
    if (from.empty()) flags.enable_checkpointing(true).callbacks({saving});
    Trainer trainer(flags);
    torch::manual_seed(static_cast<uint64_t>(from.empty() ? 11 + trainer.global_rank() : 99));
    auto arguments = RunArguments();
    if (!from.empty()) arguments.ckpt_path(Ranks::folder() + "/" + from);
    trainer.fit(std::make_shared<Unscheduled>(), data(), val(), arguments);
    trainer.save_checkpoint(Ranks::folder() + "/" + to);
  };
  fit("", "whole.ckpt");
  fit("steps/step=3.ckpt", "resumed.ckpt");
}

TEST_CASE("two ranks that resume end where they would have without a break", "[ranks]") {
  Ranks ranks;
  const auto ended = ranks.run("program: resumes");
  INFO(ended.output);
  REQUIRE(ended.status == 0);
  const auto leaves = [&](const char* name) {
    auto state = read_torch_file(ranks.dir().path(name));
    CHECK(state.at("exact_resume").at("ranks").as_list().size() == 2);
    state.as_dict().erase("callbacks");  // the first run alone saves
    return leaves_of(state);
  };
  CHECK(differences(leaves("whole.ckpt"), leaves("resumed.ckpt")) == "");
}

TEST_CASE("program: is told to end", "[.program]") {
  struct Ending : Net {
    StepOutput training_step(const Batch& batch, int64_t batch_idx) override {
      const bool here = Ranks::variable("WHO").find(str(global_rank())) != std::string::npos;
      if (here && current_epoch() == 0 && batch_idx == 2) ::raise(SIGTERM);
      return layer(batch.tensor()).mean();
    }
  };
  ::signal(SIGTERM, SIG_DFL);  // Catch has a handler of its own
  auto saving = std::make_shared<OnExceptionCheckpoint>(
      OnExceptionCheckpointOptions().dirpath(Ranks::folder()));
  Trainer trainer(options().max_epochs(1000).enable_checkpointing(true).callbacks({saving}));
  try {
    trainer.fit(std::make_shared<Ending>(), numbers(400));
  } catch (const SIGTERMException&) {
    write_json(str("rank", trainer.global_rank(), ".json"), Json(trainer.global_step()));
    std::exit(5);
  }
}

TEST_CASE("SIGTERM for a rank ends all at the same batch, and the run is saved", "[ranks]") {
  Ranks ranks;
  const auto ended =
      ranks.run("program: is told to end", {{"WHO", GENERATE(as<std::string>{}, "0", "1", "01")}});
  INFO(ended.output);
  CHECK(ended.status == 5);
  CHECK(ended.still_running == 0);
  CHECK(fs::exists(ranks.dir().path("on_exception.ckpt")));
  const auto stopped_at = read_json(ranks.dir().path("rank0.json"));
  CHECK(read_json(ranks.dir().path("rank1.json")) == stopped_at);
  const auto saved = read_torch_file(ranks.dir().path("on_exception.ckpt"));
  CHECK(saved.at("global_step").as_int() == stopped_at);
}

namespace {

// Numbers from 0, of which each rank reads another count: its own doing.
class Counting : public StreamDataset {
 public:
  explicit Counting(int64_t size) : size_(size) {}
  std::unique_ptr<Stream> open(const WorkerInfo&) override {
    struct Numbers : Stream {
      explicit Numbers(int64_t size) : left(size) {}
      std::optional<Batch> next() override {
        if (left-- <= 0) return std::nullopt;
        return Batch(at::full({1}, static_cast<float>(left)));
      }
      int64_t left;
    };
    return std::make_unique<Numbers>(size_);
  }

 private:
  int64_t size_;
};

}  // namespace

TEST_CASE("program: reads streams", "[.program]") {
  Trainer trainer(options());
  auto net = std::make_shared<Net>();
  const auto rank = trainer.global_rank();
  trainer.fit(net, DataLoader(std::make_shared<Counting>(rank == 0 ? 11 : 7), 2));
  Json batches;
  for (const auto& [epoch, seen] : net->seen) batches[epoch] = seen.size();
  batches["steps"] = trainer.global_step();
  write_json(str("rank", rank, ".json"), batches);
}

TEST_CASE("ranks whose streams end at different places end their epochs together", "[ranks]") {
  Ranks ranks;
  const auto ended = ranks.run("program: reads streams");
  INFO(ended.output);
  REQUIRE(ended.status == 0);
  for (const char* name : {"rank0.json", "rank1.json"}) {
    const auto found = read_json(ranks.dir().path(name));
    CHECK(found.at("train 0") == 4);
    CHECK(found.at("train 1") == 4);
    CHECK(found.at("steps") == 8);
  }
  CHECK_THAT(ended.output, Contains("end before those of others, after 4 batches"));
}

// ---- Uneven data --------------------------------------------------------------------------------

TEST_CASE("program: has uneven data", "[.program]") {
  try {
    const auto what = Ranks::variable("WHAT");
    Trainer trainer(options().use_distributed_sampler(false));
    auto net = std::make_shared<Net>();
    const auto rank = trainer.global_rank();
    if (what == "train") trainer.fit(net, numbers(rank == 0 ? 8 : 6));
    if (what == "validate") trainer.validate(net, numbers(rank == 0 ? 8 : 6));
    if (what == "validate none") trainer.validate(net, numbers(rank == 0 ? 8 : 0));
    if (what == "allowed none") {
      net->allow_zero_length_dataloader_with_multiple_devices = true;
      trainer.predict(net, numbers(rank == 0 ? 8 : 0));
    }
  } catch (const std::exception& error) {
    std::cerr << "This rank got: " << error.what() << std::endl;
    throw;
  }
}

TEST_CASE("ranks with unequal data are an error where that cannot go well", "[ranks]") {
  struct Case {
    const char* what;
    const char* error;  // empty: none
  };
  const auto [what, error] = GENERATE(values<Case>({
      {"train", "The train loaders of the ranks have [4, 3] batches. Training needs as many"},
      {"validate", ""},
      {"validate none", "The val loaders of the ranks have [4, 0] batches. Give each rank a batch"},
      {"allowed none", ""},
  }));
  CAPTURE(what);
  Ranks ranks;
  const auto ended = ranks.run("program: has uneven data", {{"WHAT", what}});
  INFO(ended.output);
  CHECK(ended.status == (*error == '\0' ? 0 : 1));
  CHECK(ended.still_running == 0);
  CHECK_THAT(ended.output, Contains(error));
}
