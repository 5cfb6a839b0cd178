// What users write, and what the Trainer makes of it.
#include "lightning/module.h"

#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>

#include "lightning/data/data_loader.h"
#include "lightning/datamodule.h"
#include "lightning/metrics/mean.h"
#include "lightning/overrides.h"
#include "lightning/trainer.h"
#include "tests/support/boring.h"
#include "tests/support/memory_logger.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;

namespace {

using Names = std::vector<std::string>;

// A boring module whose training step logs what a test tells it to.
struct Logging : BoringModule {
  std::function<void(Logging&, const Batch&, int64_t)> in_training_step;
  std::function<void(Logging&)> in_train_epoch_end;

  StepOutput training_step(const Batch& batch, int64_t batch_idx) override {
    if (in_training_step) in_training_step(*this, batch, batch_idx);
    return loss(batch);
  }
  void on_train_epoch_end() override {
    if (in_train_epoch_end) in_train_epoch_end(*this);
  }
};

std::string refusal_of(std::function<void(Logging&, const Batch&, int64_t)> in_training_step) {
  TempDir dir;
  auto module = std::make_shared<Logging>();
  module->in_training_step = std::move(in_training_step);
  Trainer trainer(quiet(dir).max_epochs(1));
  try {
    trainer.fit(module);
  } catch (const MisconfigurationError& error) {
    return error.what();
  }
  return "nothing was refused";
}

}  // namespace

TEST_CASE("an override is seen through the class and not through its base", "[module]") {
  struct Plain : LightningModule {};
  struct Own : LightningModule {
    void on_fit_start() override {}
  };
  struct Mixin {
    virtual ~Mixin() = default;
    int64_t padding = 0;
  };
  struct Second : Mixin, Own {};
  const Second second;
  CHECK_FALSE(is_overridden<LightningModule>(Plain(), &LightningModule::on_fit_start));
  CHECK(is_overridden<LightningModule>(Own(), &LightningModule::on_fit_start));
  CHECK(is_overridden<LightningModule>(second, &LightningModule::on_fit_start));
  CHECK_FALSE(is_overridden<LightningModule>(second, &LightningModule::on_fit_end));
}

TEST_CASE("values of an epoch are reduced as told", "[log]") {
  TempDir dir;
  auto module = std::make_shared<Logging>();
  module->in_training_step = [](Logging& m, const Batch&, int64_t i) {
    const auto value = torch::tensor(static_cast<double>(i + 1));  // 1, 2, 3, 4
    const auto epoch = LogOptions().on_step(false).on_epoch(true);
    auto options = epoch;
    m.log("mean", value, epoch);
    m.log("sum", value, options.reduce_fx(std::string("sum")));
    m.log("min", value, options.reduce_fx(std::string("min")));
    m.log("max", value, options.reduce_fx(std::string("max")));
    m.log("median", value, options.reduce_fx([](const at::Tensor& all) { return all.median(); }));
    options = epoch;
    m.log("weighted", value, options.batch_size(i == 3 ? 3 : 1));
    m.log("number", i + 1, epoch);
    m.log("both", value, LogOptions().on_step(true).on_epoch(true));
  };
  Trainer trainer(quiet(dir).max_epochs(2));
  trainer.fit(module);
  CHECK(trainer.metric("mean") == 2.5);
  CHECK(trainer.metric("sum") == 10);
  CHECK(trainer.metric("min") == 1);
  CHECK(trainer.metric("max") == 4);
  CHECK(trainer.metric("median") == 2);
  CHECK(trainer.metric("weighted") == 3);
  CHECK(trainer.metric("number") == 2.5);
  CHECK(trainer.metric("both_step") == 4);
  CHECK(trainer.metric("both_epoch") == 2.5);
  CHECK(trainer.metric("both") == 2.5);
  CHECK_FALSE(trainer.metric("nothing").has_value());
}

TEST_CASE("a Metric object is shown at each step and computed over the epoch", "[log]") {
  TempDir dir;
  auto logger = std::make_shared<MemoryLogger>();
  auto module = std::make_shared<Logging>();
  auto mean = std::make_shared<Mean>();
  module->in_training_step = [&](Logging& m, const Batch&, int64_t i) {
    mean->forward(torch::tensor(static_cast<double>(i)));
    m.log("mean", mean, LogOptions().on_step(true).on_epoch(true));
  };
  Trainer trainer(quiet(dir).max_epochs(2).logger(logger).log_every_n_steps(1));
  trainer.fit(module);
  CHECK(trainer.metric("mean_epoch") == 1.5);  // of the second epoch alone
  CHECK(trainer.metric("mean_step") == 3);
}

TEST_CASE("log says what is wrong with a call", "[log]") {
  const auto one = torch::ones({});
  CHECK_THAT(refusal_of([&](Logging& m, const Batch&, int64_t) {
               m.log("x", one, LogOptions().on_step(false).on_epoch(false));
             }),
             Contains("\"x\"") && Contains("log nothing"));
  CHECK_THAT(
      refusal_of([&](Logging& m, const Batch&, int64_t) { m.log("x/dataloader_idx_0", one); }),
      Contains("dataloader_idx"));
  CHECK_THAT(refusal_of([&](Logging& m, const Batch&, int64_t) { m.log("x", torch::ones({2})); }),
             Contains("shape [2]") && Contains("one element"));
  CHECK_THAT(refusal_of([&](Logging& m, const Batch&, int64_t) {
               m.log("x", one);
               m.log("x", one, LogOptions().prog_bar(true));
             }),
             Contains("twice in training_step"));
  CHECK_THAT(refusal_of([&](Logging& m, const Batch&, int64_t) {
               m.log("x", one, LogOptions().on_epoch(true).reduce_fx([](const at::Tensor& values) {
                 return at::stack({values.min(), values.max()});
               }));
             }),
             Contains("reduce_fx of log(\"x\")") && Contains("shape [2]"));
  CHECK_THAT(refusal_of([&](Logging& m, const Batch&, int64_t) {
               m.log("x", one, LogOptions().on_epoch(true).reduce_fx(std::string("avg")));
             }),
             Contains("\"avg\"") && Contains("mean, sum, min, max"));

  struct InFitStart : BoringModule {
    void on_fit_start() override { log("x", 1.0); }
  };
  TempDir dir;
  Trainer trainer(quiet(dir).max_epochs(1));
  CHECK_THROWS_WITH(trainer.fit(std::make_shared<InFitStart>()), Contains("on_fit_start"));
}

TEST_CASE("manual optimization steps each optimizer when told, and counts each step", "[module]") {
  struct Two : LightningModule {
    torch::nn::Linear a{register_module("a", torch::nn::Linear(32, 2))};
    torch::nn::Linear b{register_module("b", torch::nn::Linear(32, 2))};
    Two() { set_automatic_optimization(false); }
    StepOutput training_step(const Batch& batch, int64_t) override {
      auto all = optimizers();
      toggle_optimizer(*all[0]);
      CHECK(a->weight.requires_grad());
      CHECK_FALSE(b->weight.requires_grad());
      for (const auto& one : all) one->zero_grad();
      manual_backward((a(batch.tensor()) + b(batch.tensor())).pow(2).mean());
      CHECK_FALSE(b->weight.grad().defined());
      all[0]->step();
      untoggle_optimizer(*all[0]);
      CHECK(b->weight.requires_grad());
      {
        const auto scope = all[1]->toggle_model();
        CHECK_FALSE(a->weight.requires_grad());
      }
      all[1]->step([&] {
        auto loss = b(batch.tensor()).pow(2).mean();
        manual_backward(loss);
        return loss;
      });
      return skip;
    }
    Optimizers configure_optimizers() override {
      return {torch::optim::SGD(a->parameters(), 0.1), torch::optim::Adam(b->parameters(), 0.1)};
    }
    Loaders train_dataloader() override { return random_loader(); }
  };
  TempDir dir;
  auto module = std::make_shared<Two>();
  const auto before = module->a->weight.detach().clone();
  Trainer trainer(quiet(dir).max_epochs(1));
  trainer.fit(module);
  CHECK(trainer.global_step() == 8);
  CHECK_FALSE(torch::equal(before, module->a->weight));

  Trainer clipping(quiet(dir).max_epochs(1).gradient_clip_val(1.0));
  CHECK_THROWS_WITH(clipping.fit(std::make_shared<Two>()), Contains("gradient_clip_val=1"));
}

TEST_CASE("what a module leaves out or does wrong is said with the name of the hook", "[module]") {
  struct NoStep : BoringModule {
    Optimizers configure_optimizers() override { return {}; }
  };
  struct NoOptimizer : LightningModule {
    StepOutput training_step(const Batch&, int64_t) override { return skip; }
  };
  struct TwoOptimizers : BoringModule {
    Optimizers configure_optimizers() override {
      return {torch::optim::SGD(parameters(), 0.1), torch::optim::SGD(parameters(), 0.1)};
    }
  };
  struct NoClosure : BoringModule {
    void optimizer_step(int64_t, int64_t, LightningOptimizer&,
                        const LightningOptimizer::Closure&) override {}
  };
  struct VectorLoss : BoringModule {
    StepOutput training_step(const Batch& batch, int64_t) override {
      return forward(batch.tensor());
    }
  };
  struct NoLossKey : BoringModule {
    StepOutput training_step(const Batch& batch, int64_t) override {
      return Batch::map({{"los", loss(batch)}});
    }
  };
  struct PlateauWithoutMonitor : BoringModule {};
  TempDir dir;
  const auto message = [&](std::shared_ptr<LightningModule> module) -> std::string {
    try {
      Trainer trainer(quiet(dir).max_epochs(1));
      trainer.fit(std::move(module));
    } catch (const MisconfigurationError& error) {
      return error.what();
    }
    return "nothing was refused";
  };
  CHECK_THAT(message(std::make_shared<LightningModule>()), Contains("overrides no training_step"));
  CHECK_THAT(message(std::make_shared<NoOptimizer>()),
             Contains("NoOptimizer overrides no configure_optimizers"));
  CHECK_THAT(message(std::make_shared<TwoOptimizers>()), Contains("returned 2 optimizers"));
  CHECK_THAT(message(std::make_shared<NoClosure>()), Contains("without running its closure"));
  CHECK_THAT(message(std::make_shared<VectorLoss>()),
             Contains("shape [2, 2]") && Contains("scalar"));
  CHECK_THAT(message(std::make_shared<NoLossKey>()), Contains("los") && Contains("no \"loss\""));
  CHECK(message(std::make_shared<NoStep>()) == "nothing was refused");  // runs without training
}

TEST_CASE("callbacks of configure_callbacks replace those of their type for the run", "[module]") {
  struct Counter : Callback {
    int starts = 0;
    void on_train_start(Trainer&, LightningModule&) override { ++starts; }
  };
  struct WithCallback : BoringModule {
    std::shared_ptr<Counter> own = std::make_shared<Counter>();
    std::vector<std::shared_ptr<Callback>> configure_callbacks() override { return {own}; }
  };
  TempDir dir;
  auto given = std::make_shared<Counter>();
  auto module = std::make_shared<WithCallback>();
  Trainer trainer(quiet(dir).max_epochs(1).callbacks({given}));
  trainer.fit(module);
  CHECK(given->starts == 0);
  CHECK(module->own->starts == 1);
  trainer.fit(std::make_shared<BoringModule>());
  CHECK(given->starts == 0);  // max_epochs is reached: nothing is left to train
}

TEST_CASE("configure_model runs once in the life of a module", "[module]") {
  struct Late : BoringModule {
    int configured_times = 0;
    void configure_model() override { ++configured_times; }
  };
  TempDir dir;
  auto module = std::make_shared<Late>();
  Trainer trainer(quiet(dir).max_epochs(1));
  trainer.fit(module);
  trainer.test(module);
  CHECK(module->configured_times == 1);
}

namespace {

struct WidthOptions : Options<WidthOptions> {
  OPTION(int64_t, width, 3, "Columns.");
  OPTION(std::optional<double>, dropout, std::nullopt, "Share of columns left out.");
};

struct Wide : BoringModule {
  explicit Wide(const WidthOptions& options) { save_hyperparameters(options); }
};

struct Data : LightningDataModule {
  Names calls;
  std::string failure;
  void setup(Stage stage) override { calls.push_back(str("setup ", to_string(stage))); }
  void teardown(Stage) override { calls.push_back("teardown"); }
  Loaders train_dataloader() override { return random_loader(); }
  Loaders test_dataloader() override { return random_loader(4); }
  State state_dict() const override { return State::dict({{"seen", 7}}); }
  void on_exception(const std::exception& exception) override { failure = exception.what(); }
};

}  // namespace

TEST_CASE("a module's options are its hyper-parameters: logged and saved", "[module]") {
  TempDir dir;
  auto logger = std::make_shared<MemoryLogger>();
  auto module = std::make_shared<Wide>(WidthOptions().width(5));
  CHECK(module->hparams() == Json{{"width", 5}, {"dropout", nullptr}});
  Trainer trainer(quiet(dir).max_epochs(1).logger(logger));
  trainer.fit(module, std::make_shared<Data>());
  CHECK(logger->hparams == module->hparams());

  const auto path = dir.path() + "/x.ckpt";
  trainer.save_checkpoint(path);
  const auto saved = trainer.strategy().load_checkpoint(path);
  CHECK(saved.at("hyper_parameters").at("width").as_int() == 5);
  CHECK(saved.at("hyper_parameters").at("dropout").is_none());
  CHECK(saved.at("Data").at("seen").as_int() == 7);
}

TEST_CASE("an exception reaches callbacks, data module and caller; no teardown hook runs",
          "[trainer]") {
  struct Watcher : Callback {
    std::string failure;
    bool torn_down = false;
    void on_exception(Trainer&, LightningModule&, const std::exception& exception) override {
      failure = exception.what();
    }
    void teardown(Trainer&, LightningModule&, Stage) override { torn_down = true; }
  };
  TempDir dir;
  auto watcher = std::make_shared<Watcher>();
  auto data = std::make_shared<Data>();
  auto module = std::make_shared<BoringModule>();
  module->before_training_step = [](BoringModule&, int64_t batch_idx) {
    if (batch_idx == 2) throw std::out_of_range("the third batch");
  };
  Trainer trainer(quiet(dir).max_epochs(1).callbacks({watcher}));
  CHECK_THROWS_AS(trainer.fit(module, data), std::out_of_range);
  CHECK(watcher->failure == "the third batch");
  CHECK(data->failure == "the third batch");
  CHECK_FALSE(watcher->torn_down);
  CHECK(data->calls == Names{"setup fit"});
  CHECK(trainer.interrupted());
}

TEST_CASE("a run goes on exactly where its checkpoint was saved at an epoch's end", "[trainer]") {
  const auto train = [](Trainer& trainer, const std::string& from = "") {
    torch::manual_seed(1);
    auto module = std::make_shared<BoringModule>();
    trainer.fit(module, Loaders(), Loaders(), RunArguments().ckpt_path(from));
    return module->layer->weight.detach().clone();
  };
  TempDir dir;
  Trainer whole(quiet(dir).max_epochs(4));
  const auto expected = train(whole);
  Trainer half(quiet(dir).max_epochs(2));
  train(half);
  const auto path = dir.path() + "/half.ckpt";
  half.save_checkpoint(path);
  Trainer rest(quiet(dir).max_epochs(4));
  CHECK(torch::equal(train(rest, path), expected));
  CHECK(rest.global_step() == whole.global_step());
  CHECK(rest.current_epoch() == 4);
}

TEST_CASE("a run inside a run of the same Trainer is refused, and the outer one goes on",
          "[trainer]") {
  TempDir dir;
  Trainer trainer(quiet(dir).max_epochs(1));
  auto module = std::make_shared<BoringModule>();
  int refused = 0;
  module->before_training_step = [&](BoringModule&, int64_t) {
    try {
      trainer.fit(std::make_shared<BoringModule>());
    } catch (const MisconfigurationError& error) {
      ++refused;
      CHECK_THAT(error.what(), Contains("runs already"));
    }
  };
  trainer.fit(module);
  CHECK(refused == 4);
  CHECK(trainer.global_step() == 4);
}

TEST_CASE("after a run that failed the same Trainer runs again", "[trainer]") {
  struct FailsToTest : BoringModule {
    StepOutput test_step(const Batch& batch, int64_t) override {
      log("test_loss", loss(batch));
      throw std::runtime_error("no test today");
    }
  };
  struct FailsToo : Callback {
    void on_exception(Trainer& trainer, LightningModule&, const std::exception&) override {
      static_cast<void>(trainer.callback_metrics());
      throw std::logic_error("nor a handler");
    }
  };
  struct Later : Callback {
    bool heard = false;
    void on_exception(Trainer&, LightningModule&, const std::exception&) override { heard = true; }
  };
  TempDir dir;
  auto later = std::make_shared<Later>();
  Trainer trainer(quiet(dir).max_epochs(1).callbacks({std::make_shared<FailsToo>(), later}));
  CHECK_THROWS_WITH(trainer.test(std::make_shared<FailsToTest>()), "no test today");
  CHECK(later->heard);
  CHECK(trainer.callback_metrics().empty());
  trainer.fit(std::make_shared<BoringModule>());
  CHECK(trainer.global_step() == 4);

  struct ThrowsNumber : BoringModule {
    void on_train_start() override { throw 42; }
  };
  Trainer second(quiet(dir).max_epochs(1));
  CHECK_THROWS_AS(second.fit(std::make_shared<ThrowsNumber>()), int);
  second.fit(std::make_shared<BoringModule>());
  CHECK(second.global_step() == 4);
}

TEST_CASE("what is null or missing is said, not followed", "[trainer]") {
  struct NullCallback : BoringModule {
    std::vector<std::shared_ptr<Callback>> configure_callbacks() override { return {nullptr}; }
  };
  struct NullMetric : BoringModule {
    std::shared_ptr<Mean> mean;
    StepOutput training_step(const Batch& batch, int64_t) override {
      log("mean", mean);
      return loss(batch);
    }
  };
  struct NoTestData : BoringModule {
    Loaders test_dataloader() override { return {}; }
  };
  TempDir dir;
  Trainer trainer(quiet(dir).max_epochs(1));
  CHECK_THROWS_WITH(trainer.fit(nullptr), Contains("null"));
  CHECK_THROWS_WITH(trainer.fit(std::make_shared<NullCallback>()),
                    Contains("callback that is null"));
  CHECK_THROWS_WITH(trainer.fit(std::make_shared<NullMetric>()), Contains("metric that is null"));
  CHECK_THROWS_WITH(trainer.test(std::make_shared<NoTestData>()), Contains("No test data"));
  CHECK_THROWS_WITH(trainer.fit(std::make_shared<BoringModule>(),
                                Loaders(std::vector<Loaders>{random_loader(), Loaders()})),
                    Contains("train loaders hold one that is null"));
}
