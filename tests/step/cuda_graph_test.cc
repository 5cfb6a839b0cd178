#include "lightning/step/cuda_graph.h"

#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "lightning.h"
#include "tests/step/step_runs.h"

using Catch::Matchers::Contains;
using namespace lightning;
using namespace lightning::testing;

namespace {

// ---- A device without graphs --------------------------------------------------------------------

// Does at each launch what it was asked to record, on the inputs of then: what is around a graph
// can be watched without a GPU.
struct Fake {
  int warm_ups = 0, recordings = 0, launches = 0;
  bool rehearses = false;  // runs what is recorded, for its errors
  std::string failure;     // of a recording

  class Work : public RecordedWork {
   public:
    Work(Fake& fake, std::function<void()> work) : fake_(fake), work_(std::move(work)) {}
    void launch() override {
      ++fake_.launches;
      work_();
    }

   private:
    Fake& fake_;
    std::function<void()> work_;
  };

  class Device : public GraphDevice {
   public:
    explicit Device(Fake& fake) : fake_(fake) {}
    void warm_up(const std::function<void()>& work) override {
      ++fake_.warm_ups;
      work();
    }
    std::unique_ptr<RecordedWork> record(const std::function<void()>& work) override {
      ++fake_.recordings;
      if (!fake_.failure.empty()) throw std::runtime_error(fake_.failure);
      if (fake_.rehearses) work();
      return std::make_unique<Work>(fake_, work);
    }

   private:
    Fake& fake_;
  };

  std::shared_ptr<CUDAGraphExecutor> executor(const CUDAGraphOptions& options = {}) {
    return std::make_shared<CUDAGraphExecutor>(
        options, [this](c10::Device) { return std::make_unique<Device>(*this); });
  }
};

std::string error_of(const std::function<void()>& work) {
  try {
    work();
  } catch (const MisconfigurationError& error) {
    return error.what();
  }
  return "nothing was thrown";
}

}  // namespace

// ---- What is around a graph ---------------------------------------------------------------------

TEST_CASE("steps that are replayed count, log and train as ordinary ones", "[step]") {
  TempDir dir;
  const auto window = GENERATE(1, 2, 3);
  const auto rest = GENERATE(4, 2);
  CAPTURE(window, rest);
  auto options = options_in(dir).accumulate_grad_batches(window).gradient_clip_val(0.5);
  const auto eager = outcome(options, std::make_shared<Net>(), data(7, rest));

  Fake fake;
  auto executor = fake.executor(CUDAGraphOptions().warmup_steps(1));
  Said said;
  const auto graphed = outcome(options.compile(executor), std::make_shared<Net>(), data(7, rest));

  check_same(graphed, eager);
  INFO(said.text);
  CHECK(said.count("cuda_graph") == 0);
  CHECK(fake.launches == executor->replayed());
  CHECK(fake.launches + fake.warm_ups == 21);
  // Windows of one batch: of each shape one step. Of more: a first, a last, and between them one
  // that neither zeroes nor steps. The last batch steps though its window is not full.
  const int full = window == 1 ? 1 : window == 2 ? 2 : 3;
  const int rested = rest == 4 && window == 1 ? 0 : 1;
  CHECK(fake.recordings == full + rested);
}

TEST_CASE("validation in between leaves the graphs as they are", "[step]") {
  TempDir dir;
  auto options = options_in(dir).val_check_interval(int64_t{3});
  const auto eager = outcome(options, std::make_shared<Net>(), data(), data(2));
  Fake fake;
  const auto graphed = outcome(options.compile(fake.executor(CUDAGraphOptions().warmup_steps(2))),
                               std::make_shared<Net>(), data(), data(2));
  check_same(graphed, eager);
  CHECK(fake.recordings == 1);
  CHECK(fake.warm_ups == 2);
}

TEST_CASE("a model whose modes or parameters changed is recorded anew", "[step]") {
  TempDir dir;
  const auto change = GENERATE(0, 1, 2);
  CAPTURE(change);
  const auto make = [&] {
    auto net = std::make_shared<Net>();
    net->after_batch = [change, batches = 0](Net& self, int64_t) mutable {
      if (++batches != 5) return;
      if (change == 0) self.dropout->eval();
      if (change == 1) self.first->bias.set_requires_grad(false);
      if (change == 2) self.first->bias.set_data(self.first->bias.detach().clone());
    };
    return net;
  };
  const auto eager = outcome(options_in(dir), make(), data());
  Fake fake;
  const auto graphed = outcome(
      options_in(dir).compile(fake.executor(CUDAGraphOptions().warmup_steps(2))), make(), data());
  check_same(graphed, eager);
  CHECK(fake.recordings == 2);
  CHECK(fake.warm_ups == 4);
}

TEST_CASE("a model that changes again and again runs without a graph", "[step]") {
  TempDir dir;
  auto net = std::make_shared<Net>();
  net->after_batch = [](Net& self, int64_t) { self.dropout->train(!self.dropout->is_training()); };
  Fake fake;
  Said said;
  outcome(options_in(dir).compile(fake.executor(CUDAGraphOptions().warmup_steps(1).max_graphs(2))),
          net, data());
  CHECK(said.count("modes or parameters change again and again") == 1);
  CHECK(fake.launches == 0);
}

TEST_CASE("parameters that a hook writes are trained on in ordinary steps", "[step]") {
  TempDir dir;
  const auto make = [] {
    auto net = std::make_shared<Net>();
    net->after_batch = [](Net& self, int64_t batch_idx) {
      const at::NoGradGuard no_grad;
      if (batch_idx == 3) self.first->weight.mul_(0.5);
    };
    return net;
  };
  const auto eager = outcome(options_in(dir), make(), data());
  Fake fake;
  Said said;
  const auto graphed = outcome(
      options_in(dir).compile(fake.executor(CUDAGraphOptions().warmup_steps(1))), make(), data());
  check_same(graphed, eager);
  CHECK(said.count("beside the optimizer writes the parameters") == 1);
  CHECK(fake.recordings == 1);
  CHECK(fake.warm_ups == 1 + 3);
}

TEST_CASE("more shapes than max_graphs run as ordinary steps, which is said once", "[step]") {
  TempDir dir;
  const auto eager = outcome(options_in(dir), std::make_shared<Net>(), data(6, 2));
  Fake fake;
  Said said;
  const auto graphed = outcome(
      options_in(dir).compile(fake.executor(CUDAGraphOptions().warmup_steps(1).max_graphs(1))),
      std::make_shared<Net>(), data(6, 2));
  check_same(graphed, eager);
  CHECK(fake.recordings == 1);
  CHECK(fake.launches == 3 * 5 - 1);
  INFO(said.text);
  CHECK(said.count("max_graphs=1") == 1);
  CHECK_THAT(said.text, Contains("{x: float32 [2, 6], y: float32 [2, 1]}"));
}

// ---- What cannot be recorded --------------------------------------------------------------------

namespace {

// Trains `net` with a device that rehearses, beside an ordinary run of another of the kind; returns
// what was said.
template <class MakeNet>
std::string refused(const MakeNet& make, TrainerOptions options, const std::string& failure = "") {
  const auto eager = outcome(options, make(), data());
  Fake fake;
  fake.rehearses = true;
  fake.failure = failure;
  Said said;
  const auto graphed = outcome(options.compile(fake.executor()), make(), data());
  check_same(graphed, eager);
  CHECK(fake.launches == 0);
  INFO(said.text);
  CHECK(said.count("cuda_graph") == 1);
  return said.text;
}

template <class Step>
std::string refused_step(const Step& step) {
  TempDir dir;
  const auto make = [&] {
    auto net = std::make_shared<Net>();
    net->in_step = step;
    return net;
  };
  return refused(make, options_in(dir));
}

#define OVERRIDING(hook, ...)        \
  struct Overrides_##hook : Net {    \
    void hook(__VA_ARGS__) override; \
  };                                 \
  void Overrides_##hook::hook

OVERRIDING(on_before_zero_grad, torch::optim::Optimizer&)(torch::optim::Optimizer&) {}
OVERRIDING(optimizer_zero_grad, int64_t, int64_t, torch::optim::Optimizer&)
(int64_t, int64_t, torch::optim::Optimizer& optimizer) { optimizer.zero_grad(); }
OVERRIDING(on_before_backward, const at::Tensor&)(const at::Tensor&) {}
OVERRIDING(backward, const at::Tensor&)(const at::Tensor& loss) { loss.backward(); }
OVERRIDING(on_after_backward)() {}
OVERRIDING(on_before_optimizer_step, torch::optim::Optimizer&)(torch::optim::Optimizer&) {}
OVERRIDING(configure_gradient_clipping, torch::optim::Optimizer&, std::optional<double>,
           const std::optional<std::string>&)
(torch::optim::Optimizer&, std::optional<double>, const std::optional<std::string>&) {}
OVERRIDING(optimizer_step, int64_t, int64_t, LightningOptimizer&,
           const LightningOptimizer::Closure&)
(int64_t, int64_t, LightningOptimizer& optimizer, const LightningOptimizer::Closure& closure) {
  optimizer.step(closure);
}

template <class Module>
std::string refused_module() {
  TempDir dir;
  return refused([] { return std::make_shared<Module>(); }, options_in(dir));
}

struct Watcher : Callback {
  void on_after_backward(Trainer&, LightningModule&) override {}
};

}  // namespace

TEST_CASE("a hook inside the step keeps it as it is written, named once", "[step]") {
  const auto says = [](const std::string& text, const std::string& hook) {
    CHECK_THAT(text, Contains("Overrides_" + hook + " overrides " + hook));
  };
  says(refused_module<Overrides_on_before_zero_grad>(), "on_before_zero_grad");
  says(refused_module<Overrides_optimizer_zero_grad>(), "optimizer_zero_grad");
  says(refused_module<Overrides_on_before_backward>(), "on_before_backward");
  says(refused_module<Overrides_backward>(), "backward");
  says(refused_module<Overrides_on_after_backward>(), "on_after_backward");
  says(refused_module<Overrides_on_before_optimizer_step>(), "on_before_optimizer_step");
  says(refused_module<Overrides_configure_gradient_clipping>(), "configure_gradient_clipping");
  says(refused_module<Overrides_optimizer_step>(), "optimizer_step");

  TempDir dir;
  const auto text = refused([] { return std::make_shared<Net>(); },
                            options_in(dir).callbacks({std::make_shared<Watcher>()}));
  CHECK_THAT(text, Contains("Watcher overrides on_after_backward"));
}

TEST_CASE("a step that does on the host what a replay leaves out stays as it is, with the reason",
          "[step]") {
  CHECK_THAT(refused_step([](Net& net, int64_t) { net.log("rows", 4); }),
             Contains("log(\"rows\") in training_step gets a number"));
  CHECK_THAT(refused_step([](Net& net, int64_t) { net.global_step(); }),
             Contains("training_step asks for global_step()"));
  CHECK_THAT(refused_step([](Net& net, int64_t) { net.current_epoch(); }),
             Contains("training_step asks for current_epoch()"));
  CHECK_THAT(refused_step([](Net& net, int64_t) { net.trainer(); }),
             Contains("training_step asks for the trainer"));
  CHECK_THAT(refused_step([](Net& net, int64_t) { net.lr_schedulers(); }),
             Contains("training_step asks for the schedules"));
}

TEST_CASE("a step that returns numbers of the host stays as it is", "[step]") {
  struct ReturnsNumber : Net {
    StepOutput training_step(const Batch& batch, int64_t batch_idx) override {
      const auto output = Net::training_step(batch, batch_idx);
      auto extra = output.extra();
      extra.set("batch_idx", batch_idx);
      return StepOutput(extra);
    }
  };
  TempDir dir;
  Fake fake;
  fake.rehearses = true;
  Said said;
  outcome(options_in(dir).compile(fake.executor()), std::make_shared<ReturnsNumber>(), data());
  CHECK(said.count("training_step returns what it computed on the host") == 1);
  CHECK(fake.launches == 0);
}

TEST_CASE("a metric that keeps rows of every batch keeps the step as it is", "[step]") {
  struct Rows : Metric {
    Rows() { add_state("rows", at::zeros({0}), Reduction::kCat); }
    void update(const at::Tensor& values, const at::Tensor&) override {
      append(0, values.reshape(-1));
    }
    at::Tensor compute() const override { return cat(0).mean(); }
  };
  struct KeepsRows : Net {
    StepOutput training_step(const Batch& batch, int64_t batch_idx) override {
      rows.update(batch["y"], {});
      return Net::training_step(batch, batch_idx);
    }
    Rows rows;
  };
  CHECK_THAT(refused_module<KeepsRows>(), Contains("a metric keeps rows of every batch"));
}

TEST_CASE("a kind of step that failed is not tried again", "[step]") {
  TempDir dir;
  Fake fake;
  fake.failure = "nothing can be recorded";
  Said said;
  outcome(options_in(dir).accumulate_grad_batches(2).compile(fake.executor()),
          std::make_shared<Net>(), data());
  CHECK(said.count("nothing can be recorded") == 1);
  CHECK(fake.recordings == 2);  // of the first and of the last batch of a window
}

TEST_CASE("a recording that fails leaves the run as it was, and says why", "[step]") {
  TempDir dir;
  const auto text =
      refused([] { return std::make_shared<Net>(); }, options_in(dir).accumulate_grad_batches(2),
              "operation not permitted when stream is capturing\nframe 0: somewhere");
  CHECK_THAT(text, Contains("operation not permitted when stream is capturing") &&
                       Contains("waits for the GPU (item()") && !Contains("frame 0"));
}

TEST_CASE("an optimizer without a fused step keeps the steps as they are", "[step]") {
  struct WithRMSprop : Net {
    Optimizers configure_optimizers() override { return torch::optim::RMSprop(parameters(), 0.01); }
  };
  CHECK_THAT(refused_module<WithRMSprop>(), Contains("RMSprop computes its step on the host"));
}

TEST_CASE("manual optimization is run as it is written, which is said", "[step]") {
  struct ByHand : Net {
    ByHand() { set_automatic_optimization(false); }
    StepOutput training_step(const Batch& batch, int64_t batch_idx) override {
      auto output = Net::training_step(batch, batch_idx);
      optimizer().zero_grad();
      manual_backward(output.loss());
      optimizer().step();
      return output;
    }
  };
  CHECK_THAT(refused_module<ByHand>(), Contains("optimizes by hand"));
}

TEST_CASE("batches that no graph can read are run by ordinary steps", "[step]") {
  TempDir dir;
  struct WithGradient : Net {
    Batch on_after_batch_transfer(Batch batch, int64_t) override {
      batch.set("x", batch["x"].clone().requires_grad_());
      return batch;
    }
  };
  CHECK_THAT(refused_module<WithGradient>(), Contains("requires a gradient"));

  // What is no tensor is part of the shape.
  struct WithNumber : Net {
    Batch on_after_batch_transfer(Batch batch, int64_t) override {
      batch.set("n", ++n);
      return batch;
    }
    int n = 0;
  };
  Fake fake;
  Said said;
  outcome(options_in(dir).compile(fake.executor()), std::make_shared<WithNumber>(), data());
  CHECK(fake.recordings == 0);
  CHECK(said.count("max_graphs=8") == 1);
}

TEST_CASE("cuda_graph is refused on a CPU and with options below one, saying what to write",
          "[step]") {
  TempDir dir;
  CHECK_THAT(error_of([&] {
               Trainer(options_in(dir).compile("cuda_graph")).fit(std::make_shared<Net>(), data());
             }),
             Contains("cuda_graph") && Contains("compile=\"eager\""));
  CHECK_THAT(error_of([] { CUDAGraphExecutor(CUDAGraphOptions().warmup_steps(0)); }),
             Contains("warmup_steps=0, expected at least 1"));
  CHECK_THAT(error_of([] { CUDAGraphExecutor(CUDAGraphOptions().max_graphs(0)); }),
             Contains("max_graphs=0, expected at least 1"));
}
