// What can only be seen on a GPU: tests/step/cuda_graph_test.cc watches the rest without one.
#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "lightning.h"
#include "lightning/step/cuda_graph.h"
#include "tests/step/step_runs.h"

using namespace lightning;
using namespace lightning::testing;

namespace {

bool no_gpu() {
  if (torch::cuda::is_available() && torch::cuda::device_count() > 0) return false;
  WARN("needs a GPU");
  return true;
}

TrainerOptions on_gpu(const TempDir& dir) {
  return options_in(dir).accelerator("cuda").devices(int64_t{1});
}

std::shared_ptr<CUDAGraphExecutor> graphs(int64_t warmup_steps = 2) {
  return std::make_shared<CUDAGraphExecutor>(CUDAGraphOptions().warmup_steps(warmup_steps));
}

std::shared_ptr<Net> adamw_net() {
  auto net = std::make_shared<Net>();
  net->adamw = true;
  return net;
}

}  // namespace

TEST_CASE("on a GPU a replayed run is the ordinary run bit for bit", "[step][gpu]") {
  if (no_gpu()) return;
  TempDir dir;
  const auto window = GENERATE(1, 2, 3);
  const auto rest = GENERATE(4, 2);
  const auto precision = GENERATE("32-true", "bf16-mixed");
  const bool validates = GENERATE(false, true);
  CAPTURE(window, rest, precision, validates);
  auto options =
      on_gpu(dir).max_epochs(4).accumulate_grad_batches(window).gradient_clip_val(0.5).precision(
          precision);
  if (validates) options.val_check_interval(int64_t{3});
  const auto val = validates ? data(2) : Loaders();
  const auto eager = outcome(options, adamw_net(), data(7, rest), val);
  auto executor = graphs(window == 1 ? 3 : 1);
  Said said;
  const auto graphed = outcome(options.compile(executor), adamw_net(), data(7, rest), val);
  INFO(said.text);
  CHECK(said.count("cuda_graph") == 0);
  INFO("recorded " << executor->recorded() << ", replayed " << executor->replayed());
  CHECK(executor->recorded() >= 1);
  CHECK(executor->replayed() >= 12);
  check_same(graphed, eager);
}

TEST_CASE("on a GPU a gradient scaler's run is replayed bit for bit", "[step][gpu]") {
  if (no_gpu()) return;
  TempDir dir;
  const auto options = on_gpu(dir).max_epochs(4).precision("16-mixed").gradient_clip_val(0.5);
  const auto eager = outcome(options, adamw_net(), data());
  auto executor = graphs();
  Said said;
  const auto graphed = outcome(TrainerOptions(options).compile(executor), adamw_net(), data());
  INFO(said.text);
  INFO("recorded " << executor->recorded() << ", replayed " << executor->replayed());
  CHECK(executor->replayed() >= 12);
  check_same(graphed, eager);
}

TEST_CASE("on a GPU replays keep gradients and counts that their graphs have not seen",
          "[step][gpu]") {
  if (no_gpu()) return;
  // Steps of one row train `other`, those of two do not: a graph that was recorded while `other`
  // had no gradient comes to a window in which it has one, and graphs step different parameters.
  struct Branches : Net {
    Branches() { other = register_module("other", torch::nn::Linear(6, 8)); }
    StepOutput training_step(const Batch& batch, int64_t) override {
      const auto x = batch["x"][0];
      const auto hidden = x.size(0) == 1 ? other(x) : first(x);
      const auto loss = torch::mse_loss(last(hidden), batch["y"][0]);
      return StepOutput(Batch::map({{"loss", loss}, {"out", loss.detach()}}));
    }
    torch::nn::Linear other{nullptr};
  };
  const std::vector<int64_t> rows = {2, 2, 2, 2, 2, 2, 1, 2, 2, 2, 2, 1,
                                     2, 1, 2, 1, 2, 2, 1, 1, 2, 2, 1, 1};
  const auto sample = [&](int64_t i) {
    const auto n = rows[static_cast<size_t>(i)];
    const auto x = at::sin(at::arange(6 * n, at::kFloat) * static_cast<double>(i + 1));
    return Batch::map({{"x", x.view({n, 6})}, {"y", at::ones({n, 1})}});
  };
  const auto loader = [&] {
    const auto size = static_cast<int64_t>(rows.size());
    return Loaders(
        DataLoader(std::make_shared<FunctionDataset>(size, sample), DataLoaderOptions(1)));
  };
  const auto branches = [] {
    auto net = std::make_shared<Branches>();
    net->adamw = true;
    return net;
  };
  const auto window = GENERATE(1, 2, 3, 4, 6);
  CAPTURE(window);
  TempDir dir;
  auto options = on_gpu(dir).max_epochs(4).accumulate_grad_batches(window);
  const auto eager = outcome(options, branches(), loader());
  auto executor = graphs(1);
  Said said;
  const auto graphed = outcome(options.compile(executor), branches(), loader());
  INFO(said.text);
  INFO("recorded " << executor->recorded() << ", replayed " << executor->replayed());
  CHECK(executor->replayed() >= 12);
  check_same(graphed, eager);
}

TEST_CASE("on a GPU a step that reads on the host falls back and trains on", "[step][gpu]") {
  if (no_gpu()) return;
  TempDir dir;
  const auto window = GENERATE(1, 2);
  const auto make = [] {
    auto net = adamw_net();
    net->in_step = [](Net& self, int64_t) {
      if (self.first->weight.sum().item<double>() > 1e9) throw std::runtime_error("diverged");
    };
    return net;
  };
  const auto options = on_gpu(dir).accumulate_grad_batches(window);
  const auto eager = outcome(options, make(), data());
  auto executor = graphs();
  Said said;
  const auto graphed = outcome(TrainerOptions(options).compile(executor), make(), data());
  INFO(said.text);
  CHECK(said.count("recording it failed") == 1);
  CHECK(executor->recorded() == 0);
  check_same(graphed, eager);
  // Nothing of the failure is left: the next run records, draws and allocates.
  auto next = graphs();
  const auto again = outcome(TrainerOptions(options).compile(next), adamw_net(), data());
  CHECK(next->replayed() > 0);
  check_same(again, outcome(options, adamw_net(), data()));
}

TEST_CASE("on a GPU a step that fails behind backward leaves nothing half done", "[step][gpu]") {
  if (no_gpu()) return;
  TempDir dir;
  // The optimizer's own gradients are looked at after backward, within the recording.
  struct Clips : Net {
    StepOutput training_step(const Batch& batch, int64_t batch_idx) override {
      auto output = Net::training_step(batch, batch_idx);
      output.loss().register_hook([](const at::Tensor& gradient) {
        TORCH_CHECK(gradient.item<double>() > 0, "no gradient");
      });
      return output;
    }
  };
  const auto precision = GENERATE("32-true", "bf16-mixed", "16-mixed");
  CAPTURE(precision);
  const auto make = [] {
    auto net = std::make_shared<Clips>();
    net->adamw = true;
    return net;
  };
  const auto options = on_gpu(dir).precision(precision);
  const auto eager = outcome(options, make(), data());
  Said said;
  const auto graphed = outcome(TrainerOptions(options).compile(graphs()), make(), data());
  INFO(said.text);
  CHECK(said.count("recording it failed") == 1);
  check_same(graphed, eager);
}

TEST_CASE("on a GPU a run resumes between replays as if it had not stopped", "[step][gpu]") {
  if (no_gpu()) return;
  TempDir dir;
  const auto options = on_gpu(dir).max_epochs(4).accumulate_grad_batches(2);
  const auto whole = outcome(TrainerOptions(options).compile(graphs(1)), adamw_net(), data());

  struct SavesAt : Callback {
    explicit SavesAt(std::string path) : path(std::move(path)) {}
    void on_train_batch_end(Trainer& trainer, LightningModule&, const StepOutput&, const Batch&,
                            int64_t) override {
      if (++batches == 15) trainer.save_checkpoint(path);
    }
    std::string path;
    int batches = 0;
  };
  const auto path = dir.path() + "/at_15.ckpt";
  outcome(TrainerOptions(options).compile(graphs(1)).callbacks({std::make_shared<SavesAt>(path)}),
          adamw_net(), data());
  auto net = adamw_net();
  Trainer trainer(TrainerOptions(options).compile(graphs(1)).logger(false));
  trainer.fit(net, data(), Loaders(), RunArguments().ckpt_path(path));
  std::vector<at::Tensor> weights;
  for (const auto& parameter : net->parameters()) weights.push_back(parameter.detach().cpu());
  check_same(weights, whole.weights, "parameter");
}
