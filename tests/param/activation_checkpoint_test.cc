#include "lightning/param/activation_checkpoint.h"

#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>
#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <map>
#include <string>

#include "tests/param/live_bytes.h"
#include "tests/param/sharded.h"

using Catch::Matchers::Contains;
using namespace lightning;
namespace nn = torch::nn;

namespace {

struct BlockImpl : nn::Module {
  explicit BlockImpl(int64_t width) {
    norm = register_module("norm", nn::LayerNorm(nn::LayerNormOptions({width})));
    up = register_module("up", nn::Linear(width, 4 * width));
    down = register_module("down", nn::Linear(4 * width, width));
  }
  at::Tensor forward(const at::Tensor& x) {
    return x + torch::dropout(down(torch::gelu(up(norm(x)))), 0.1, is_training());
  }
  nn::LayerNorm norm{nullptr};
  nn::Linear up{nullptr}, down{nullptr};
};
TORCH_MODULE(Block);

struct Model : nn::Module {
  explicit Model(int64_t width = 8, int64_t depth = 3) {
    table = register_module("table", nn::Embedding(11, width));
    for (int64_t i = 0; i < depth; ++i) blocks->push_back(Block(width));
    register_module("blocks", blocks);
    head = register_module("head", nn::Linear(width, 11));
  }
  at::Tensor trunk(at::Tensor x, int64_t rounds = 1) {
    for (int64_t i = 0; i < rounds; ++i) {
      for (const auto& block : *blocks) x = block->as<BlockImpl>()->forward(x);
    }
    return x;
  }
  at::Tensor loss(const at::Tensor& ids, int64_t rounds = 1) {
    const auto logits = head(trunk(table(ids), rounds));
    return torch::cross_entropy_loss(logits.flatten(0, 1), ids.roll(1, 1).flatten());
  }
  nn::Embedding table{nullptr};
  nn::ModuleList blocks;
  nn::Linear head{nullptr};
};

const at::Tensor kIds = torch::tensor({{1, 2, 3, 4}, {5, 6, 7, 10}});

struct Result {
  at::Tensor loss;
  std::vector<at::Tensor> gradients;
  RegionCounts counts;
};

// Two steps that accumulate.
Result train(Model& model, ActivationCheckpoints* checkpoints, int64_t rounds = 1,
             Units* units = nullptr) {
  take_region_counts();
  torch::manual_seed(7);
  Result result;
  for (int64_t step = 0; step < 2; ++step) {
    const Scope use = units == nullptr ? nullptr : units->use(true);
    const Scope regions = checkpoints == nullptr ? nullptr : checkpoints->use();
    result.loss = model.loss(kIds, rounds);
    result.loss.backward();
  }
  for (const auto& parameter : model.parameters()) result.gradients.push_back(parameter.grad());
  result.counts = take_region_counts();
  return result;
}

bool same(const at::Tensor& a, const at::Tensor& b) {
  return a.defined() == b.defined() && (!a.defined() || torch::equal(a, b));
}

void check_same(const Result& got, const Result& expected) {
  CHECK(same(got.loss, expected.loss));
  for (size_t i = 0; i < expected.gradients.size(); ++i) {
    INFO("parameter " << i);
    CHECK(same(got.gradients[i], expected.gradients[i]));
  }
}

// How often each operator runs on this thread while it lives.
class OperatorCounts {
 public:
  OperatorCounts() {
    current() = this;
    handle_ = at::addThreadLocalCallback(
        at::RecordFunctionCallback([](const at::RecordFunction& function)
                                       -> std::unique_ptr<at::ObserverContext> {
          ++current()->counts_[function.name()];
          return nullptr;
        }).scopes({at::RecordScope::FUNCTION}));
  }
  ~OperatorCounts() { at::removeCallback(handle_); }
  OperatorCounts(const OperatorCounts&) = delete;

  int64_t operator[](const std::string& name) const {
    const auto found = counts_.find(name);
    return found == counts_.end() ? 0 : found->second;
  }

 private:
  static OperatorCounts*& current() {
    thread_local OperatorCounts* current = nullptr;
    return current;
  }

  at::CallbackHandle handle_;
  std::map<std::string, int64_t> counts_;
};

std::shared_ptr<Model> make(int64_t width = 8, int64_t depth = 3) {
  torch::manual_seed(1);
  return std::make_shared<Model>(width, depth);
}

}  // namespace

TEST_CASE("blocks are computed anew by their type, and gradients are equal bit for bit",
          "[param]") {
  const auto plain = make(), model = make();
  const auto policy = GENERATE(std::vector<std::string>{}, std::vector<std::string>{"Block"},
                               std::vector<std::string>{"Block", "Linear"});
  ActivationCheckpoints checkpoints(*model, policy);
  const bool linears = policy.size() == 2;  // the head too
  const auto got = train(*model, &checkpoints);
  check_same(got, train(*plain, nullptr));
  CHECK(got.counts.recorded == 2 * (linears ? 4 : 3));
  CHECK(got.counts.replayed >= 2 * 3);
  CHECK(got.counts.dropped > 2 * 3 * 4);
}

TEST_CASE("a block that is used again, and at once, is a region each time", "[param]") {
  const auto plain = make(8, 2), model = make(8, 2);
  ActivationCheckpoints checkpoints(*model);
  const auto got = train(*model, &checkpoints, /*rounds=*/3);
  check_same(got, train(*plain, nullptr, 3));
  CHECK(got.counts.recorded == 2 * 2 * 3);

  const auto single = make(8, 1), plain_single = make(8, 1);
  ActivationCheckpoints of_single(*single, {"Block"});
  const auto again = train(*single, &of_single, 3);
  check_same(again, train(*plain_single, nullptr, 3));
  CHECK(again.counts.recorded == 2 * 3);
}

TEST_CASE("nothing is recorded outside of use, and none in evaluation", "[param]") {
  const auto model = make();
  ActivationCheckpoints checkpoints(*model);
  take_region_counts();
  const at::NoGradGuard no_grad;
  model->loss(kIds);
  CHECK(take_region_counts().recorded == 0);
}

TEST_CASE("activation memory is that of the blocks' inputs", "[param]") {
  LiveBytes::now();
  constexpr int64_t kWidth = 64, kDepth = 6;
  const auto model = make(kWidth, kDepth);
  const auto x = torch::randn({4, 64, kWidth});
  const int64_t of_input = x.numel() * 4;
  const auto live = [&](ActivationCheckpoints* checkpoints) {
    const Scope use = checkpoints == nullptr ? nullptr : checkpoints->use();
    const auto before = LiveBytes::now();
    const auto loss = model->head(model->trunk(x)).sum();
    const auto live = LiveBytes::now() - before;
    loss.backward();
    return live;
  };
  const auto plain = live(nullptr);
  ActivationCheckpoints checkpoints(*model);
  const auto with = live(&checkpoints);
  INFO(plain / of_input << " and " << with / of_input << " inputs");
  CHECK(plain > kDepth * 10 * of_input);
  // That of the first was there before; the last one's output is the head's input.
  CHECK(with >= kDepth * of_input);
  // States of the generator beside them.
  CHECK(with <= kDepth * of_input + kDepth * 8192);
}

TEST_CASE("what only leads to a block's output is not computed anew", "[param]") {
  const auto model = make();
  ActivationCheckpoints checkpoints(*model, {"Block"});
  model->eval();  // a dropout would want what it is given
  const auto products_in_backward = [&](bool with_regions) {
    const Scope use = with_regions ? checkpoints.use() : nullptr;
    const auto loss = model->loss(kIds);
    const OperatorCounts counts;
    loss.backward();
    return counts["aten::mm"];
  };
  const auto without = products_in_backward(false);
  CHECK(products_in_backward(true) == without + 3);  // of each block up, and not down
}

TEST_CASE("sharded blocks are gathered once for a replay and its backward", "[param]") {
  const bool mixed = GENERATE(false, true);
  const auto plain = make(), model = make();
  std::optional<at::ScalarType> dtype;
  if (mixed) {
    dtype = at::kBFloat16;
    for (auto& parameter : plain->parameters()) {
      parameter.set_data(parameter.to(at::kBFloat16));
    }
  }
  auto keeper = std::make_unique<Shards>(3, dtype);
  auto* const shards = keeper.get();
  UnitsOptions options;
  options.prefetch = 0;
  Units units(plan_units(*model), std::move(keeper), options);
  ActivationCheckpoints checkpoints(*model, {"Block"});
  shards->take_gathered();
  auto got = train(*model, &checkpoints, 1, &units);
  const auto expected = train(*plain, nullptr);
  got.gradients.clear();
  Result wanted{expected.loss, {}, {}};
  check_same(got, wanted);
  for (const auto& unit : units.units()) {
    for (const auto& parameter : unit->parameters()) {
      INFO(parameter->name());
      const auto gradient = plain->named_parameters()[parameter->name()].grad();
      const auto sharded = shards->gradient(*parameter);
      if (mixed) {
        // Two bf16 gradients added in float32.
        CHECK(torch::allclose(sharded, gradient.to(at::kFloat), 0.02, 1e-2));
      } else {
        CHECK(same(sharded, gradient));
      }
    }
  }
  CHECK(shards->take_gathered() == std::vector<int64_t>{0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1});
  CHECK(got.counts.replayed == 6);
}

TEST_CASE("a model that was moved, or is trained no more, is taken up or left", "[param]") {
  const auto plain = make(), model = make();
  auto checkpoints = std::make_unique<ActivationCheckpoints>(*model);
  for (auto& parameter : model->parameters()) parameter.set_data(parameter.detach().clone());
  const auto got = train(*model, checkpoints.get());
  check_same(got, train(*plain, nullptr));
  CHECK(got.counts.recorded == 6);
  checkpoints.reset();
  CHECK(backed_parameter(model->parameters()[0]) == nullptr);
  check_same(train(*model, nullptr), train(*plain, nullptr));
}

TEST_CASE("a policy that matches nothing to compute anew is refused", "[param]") {
  CHECK_THROWS_WITH(ActivationCheckpoints(*make(), {"Blok"}), Contains("Did you mean \"Block\""));
  CHECK_THROWS_WITH(ActivationCheckpoints(*nn::Linear(2, 2)),
                    Contains("no repeated blocks") && Contains("lightning::checkpoint"));
  CHECK_THROWS_WITH(ActivationCheckpoints(*nn::Sequential(nn::ReLU(), nn::Linear(1, 1)), {"ReLU"}),
                    Contains("ReLU") && Contains("no parameters"));
}
