// A model in shards that several Trainers use, one after another; weights that two modules share.
#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <functional>
#include <memory>
#include <string>

#include "lightning.h"
#include "lightning/checkpoint/torch_file.h"
#include "strategies/fsdp.h"
#include "tests/param/live_bytes.h"
#include "tests/support/ranks.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;

namespace {

using FSDP = FSDPStrategyOptions;

struct Head : torch::nn::Module {
  explicit Head(const at::Tensor& tied) : weight(register_parameter("weight", tied)) {}
  at::Tensor weight;
};

// Reads tokens and tells the next; its head has the table's weights.
struct Net : LightningModule {
  Net() {
    torch::manual_seed(5);
    table = register_module("table", torch::nn::Embedding(7, 5));
    inner = register_module("inner", torch::nn::Linear(5, 5));
    head = register_module("head", std::make_shared<Head>(table->weight));
    scale = register_parameter("scale", torch::tensor(1.5));
  }
  StepOutput training_step(const Batch& batch, int64_t) override {
    if (in_step) in_step();
    return loss(batch);
  }
  StepOutput validation_step(const Batch& batch, int64_t) override {
    log("val_loss", loss(batch), LogOptions().sync_dist(true));
    return {};
  }
  at::Tensor loss(const Batch& batch) {
    const auto tokens = batch.tensor();
    const auto hidden = torch::gelu(inner(table(tokens))) * scale;
    return torch::nn::functional::cross_entropy(hidden.matmul(head->weight.t()), (tokens + 1) % 7);
  }
  Optimizers configure_optimizers() override {
    return torch::optim::SGD(parameters(), torch::optim::SGDOptions(0.1).momentum(0.9));
  }
  torch::nn::Embedding table{nullptr};
  torch::nn::Linear inner{nullptr};
  std::shared_ptr<Head> head;
  at::Tensor scale;
  std::function<void()> in_step;
};

DataLoader tokens() {
  return DataLoader(TensorDataset(Batch(torch::arange(24) % 7)), DataLoaderOptions(3));
}

TrainerOptions options() {
  return TrainerOptions()
      .accelerator(Ranks::accelerator())
      .devices(2)
      .max_epochs(2)
      .logger(false)
      .enable_progress_bar(false)
      .enable_model_summary(false)
      .enable_checkpointing(false)
      .num_sanity_val_steps(0)
      .default_root_dir(Ranks::folder());
}

State weights_in(const std::string& file) { return read_torch_file(file).at("state_dict"); }

void check_close(const State& found, const State& expected, double tolerance) {
  for (const auto& [name, weight] : expected.as_dict()) {
    INFO(to_string(name));
    CHECK(at::allclose(found.at(name).as_tensor(), weight.as_tensor().cpu(), tolerance, tolerance));
  }
}

// Trained twice by two Trainers on a model each, the second from the first's checkpoint.
State trained_in_turn() {
  const auto first_file = Ranks::folder() + "/first.ckpt", file = Ranks::folder() + "/second.ckpt";
  Trainer first(options().strategy("ddp"));
  auto net = std::make_shared<Net>();
  first.fit(net, tokens());
  Trainer second(options().strategy("ddp"));
  second.fit(net, tokens());
  second.save_checkpoint(file);
  return weights_in(file);
}

std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "no error";
}

}  // namespace

TEST_CASE("program: is trained by two Trainers", "[.program]") {
  const auto expected = trained_in_turn();
  struct Pair {
    FSDP first, second;
  };
  for (const auto& [first_options, second_options] :
       {Pair{FSDP(), FSDP()},
        Pair{FSDP(), FSDP().auto_wrap_policy({"Linear"}).sharding_strategy("SHARD_GRAD_OP")},
        Pair{FSDP(), FSDP().sharding_strategy("NO_SHARD")},
        Pair{FSDP().sharding_strategy("NO_SHARD"), FSDP()}}) {
    CAPTURE(first_options.sharding_strategy(), second_options.sharding_strategy());
    Trainer first(options().strategy(first_options)), second(options().strategy(second_options));
    auto net = std::make_shared<Net>();
    first.fit(net, tokens());
    second.fit(net, tokens());
    const auto file = Ranks::folder() + "/taken.ckpt";
    second.save_checkpoint(file);
    check_close(weights_in(file), expected, 1e-5);
    // The first has it no more, until it runs again.
    CHECK_THAT(error_of([&] { first.save_checkpoint(file + ".none"); }),
               Contains("was taken over by another Trainer"));
    first.validate(net, tokens());
    first.save_checkpoint(file + ".first");
    check_close(weights_in(file + ".first"), expected, 1e-5);
  }
}

TEST_CASE("a Trainer of fsdp takes over a model that another has in shards", "[ranks]") {
  Ranks ranks;
  const auto ended = ranks.run("program: is trained by two Trainers");
  INFO(ended.output);
  CHECK(ended.status == 0);
  CHECK(ended.still_running == 0);
}

TEST_CASE("program: is trained by another Trainer once the first is gone", "[.program]") {
  const auto expected = trained_in_turn();
  for (const char* then : {"FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"}) {
    CAPTURE(then);
    auto net = std::make_shared<Net>();
    Trainer(options().strategy("fsdp")).fit(net, tokens());
    CHECK_THAT(error_of([&] { net->inner->weight.sum(); }), Contains("\"inner.weight\""));
    Trainer whole(options().strategy("ddp"));
    CHECK_THAT(
        error_of([&] { whole.fit(net, tokens()); }),
        Contains("\"scale\" was left in parts by a Trainer") && Contains("strategy=\"fsdp\""));
    Trainer second(options().strategy(FSDP().sharding_strategy(then)));
    second.fit(net, tokens());
    const auto file = Ranks::folder() + "/left.ckpt";
    second.save_checkpoint(file);
    check_close(weights_in(file), expected, 1e-5);
  }
}

TEST_CASE("the shards of a model outlive the Trainer that made them", "[ranks]") {
  Ranks ranks;
  const auto ended = ranks.run("program: is trained by another Trainer once the first is gone");
  INFO(ended.output);
  CHECK(ended.status == 0);
  CHECK(ended.still_running == 0);
}

TEST_CASE("program: lets a model go after its Trainer", "[.program]") {
  struct Wide : Net {
    Wide() { register_module("wide", torch::nn::Linear(1024, 1024)); }  // 4 MiB
  };
  constexpr int64_t kMiB = 1 << 20;
  const auto before = LiveBytes::now();
  auto net = std::make_shared<Wide>();
  Trainer(options().strategy("fsdp")).validate(net, tokens());
  const auto left = LiveBytes::now() - before;
  CHECK(left > kMiB);  // half of it
  CHECK(left < 3 * kMiB);
  net.reset();
  CHECK(LiveBytes::now() - before < kMiB);
}

TEST_CASE("shards that a Trainer left end with the model", "[ranks]") {
  Ranks ranks;
  const auto ended = ranks.run("program: lets a model go after its Trainer");
  INFO(ended.output);
  CHECK(ended.status == 0);
  CHECK(ended.still_running == 0);
}

TEST_CASE("program: returns to a model after another", "[.program]") {
  const auto file = Ranks::folder() + "/before.ckpt";
  Trainer trainer(options().strategy("fsdp").precision("bf16-mixed"));
  auto net = std::make_shared<Net>();
  trainer.fit(net, tokens());
  trainer.save_checkpoint(file);
  trainer.validate(std::make_shared<Net>(), tokens());
  trainer.validate(net, tokens());
  trainer.save_checkpoint(file + ".after");
  check_close(weights_in(file + ".after"), weights_in(file), 0);
}

TEST_CASE("a model keeps its shards while its Trainer has another model", "[ranks]") {
  Ranks ranks;
  const auto ended = ranks.run("program: returns to a model after another");
  INFO(ended.output);
  CHECK(ended.status == 0);
  CHECK(ended.still_running == 0);
}

TEST_CASE("program: is taken over under mixed precision", "[.program]") {
  Trainer first(options().strategy("fsdp").precision("bf16-mixed"));
  auto net = std::make_shared<Net>();
  first.fit(net, tokens());
  const auto file = Ranks::folder() + "/mixed.ckpt";
  first.save_checkpoint(file);
  Trainer second(options().strategy("fsdp").precision("32-true"));
  second.validate(net, tokens());
  second.save_checkpoint(file + ".second");
  check_close(weights_in(file + ".second"), weights_in(file), 0);  // no digit is lost
}

TEST_CASE("what is taken over are the weights that the optimizer stepped", "[ranks]") {
  Ranks ranks;
  const auto ended = ranks.run("program: is taken over under mixed precision");
  INFO(ended.output);
  CHECK(ended.status == 0);
}

TEST_CASE("program: is wanted by Trainers that cannot have it", "[.program]") {
  Trainer first(options().strategy("fsdp"));
  auto net = std::make_shared<Net>();
  Trainer inner(options().strategy("fsdp"));
  std::string nested;
  net->in_step = [&] {
    if (nested.empty()) nested = error_of([&] { inner.validate(net, tokens()); });
  };
  first.fit(net, tokens());
  CHECK_THAT(nested, Contains("whose run has not ended") && Contains("in 2 shards"));
  net->in_step = nullptr;
  for (const char* strategy : {"ddp", "single_device"}) {
    auto flags = options().strategy(strategy);
    if (std::string(strategy) == "single_device") flags.devices(1);
    Trainer other(flags);
    CHECK_THAT(error_of([&] { other.fit(net, tokens()); }),
               Contains("\"scale\" is kept by another Trainer") && Contains("strategy=\"fsdp\""));
  }
}

TEST_CASE("a Trainer that cannot take a model in shards over says why", "[ranks]") {
  Ranks ranks;
  const auto ended = ranks.run("program: is wanted by Trainers that cannot have it");
  INFO(ended.output);
  CHECK(ended.status == 0);
  CHECK(ended.still_running == 0);
}

TEST_CASE("program: wraps a tied table", "[.program]") {
  const auto file = Ranks::folder() + "/tied.ckpt";
  Trainer whole(options().strategy("ddp"));
  auto expected = std::make_shared<Net>();
  whole.fit(expected, tokens());
  whole.save_checkpoint(file);
  Trainer trainer(options().strategy(FSDP().auto_wrap_policy({"Embedding"})));
  trainer.fit(std::make_shared<Net>(), tokens());
  trainer.save_checkpoint(file + ".fsdp");
  check_close(weights_in(file + ".fsdp"), weights_in(file), 1e-5);
}

TEST_CASE("a policy that names a tied module trains right and says where its weights are",
          "[ranks]") {
  Ranks ranks;
  const auto ended = ranks.run("program: wraps a tied table");
  INFO(ended.output);
  CHECK(ended.status == 0);
  CHECK_THAT(ended.output, Contains("tied weights belong to the unit around all modules") &&
                               Contains("\"table.weight\" (used in \"head\" too)") &&
                               !Contains("without parameters of their own"));
}
