#include "lightning/param/units.h"

#include <ATen/autocast_mode.h>
#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <functional>

#include "tests/param/live_bytes.h"
#include "tests/param/sharded.h"

using Catch::Matchers::Contains;
using namespace lightning;
namespace nn = torch::nn;

namespace {

using Loss = std::function<at::Tensor(nn::Module&, int64_t step)>;
using Make = std::function<std::shared_ptr<nn::Module>()>;

// A model and its copy in shards.
struct Pair {
  Pair(const Make& make, int64_t world, const UnitsOptions& options = {},
       const std::vector<std::string>& policy = {},
       std::optional<at::ScalarType> dtype = std::nullopt) {
    torch::manual_seed(1);
    plain = make();
    torch::manual_seed(1);
    model = make();
    auto keeper = std::make_unique<Shards>(world, dtype);
    shards = keeper.get();
    units = std::make_unique<Units>(plan_units(*model, policy), std::move(keeper), options);
  }

  at::Tensor step_plain(const Loss& loss, int64_t step) {
    const auto value = loss(*plain, step);
    if (value.requires_grad()) value.backward();
    return value;
  }
  at::Tensor step(const Loss& loss, int64_t step) {
    at::Tensor value;
    {
      const Scope use = units->use(/*backward_follows=*/true);
      value = loss(*model, step);
    }
    if (value.requires_grad()) value.backward();
    return value;
  }

  std::map<std::string, const BackedParameter*> backed() const {
    std::map<std::string, const BackedParameter*> all;
    for (const auto& unit : units->units()) {
      for (const auto& each : unit->parameters()) all[each->name()] = each.get();
    }
    return all;
  }

  std::shared_ptr<nn::Module> plain, model;
  Shards* shards;
  std::unique_ptr<Units> units;
};

bool same(const at::Tensor& a, const at::Tensor& b) {
  if (!a.defined() || !b.defined()) return a.defined() == b.defined();
  return a.scalar_type() == b.scalar_type() && torch::equal(a, b);
}

void check_gradients(const Pair& pair) {
  const auto all = pair.backed();
  for (const auto& item : pair.plain->named_parameters()) {
    INFO(item.key());
    const auto found = all.find(item.key());
    if (found == all.end()) continue;  // the second name of a tied one
    CHECK(same(pair.shards->gradient(*found->second), item.value().grad()));
    CHECK_FALSE(found->second->parameter().grad().defined());
  }
}

void check_values(const Pair& pair) {
  const auto all = pair.backed();
  for (const auto& item : pair.plain->named_parameters()) {
    INFO(item.key());
    const auto found = all.find(item.key());
    if (found != all.end()) {
      CHECK(same(pair.shards->value(*found->second), item.value().detach()));
    }
  }
}

// Three steps with an optimizer that has state: losses, gradients and weights bit by bit.
void check_equal(Pair& pair, const Loss& loss) {
  const auto options = torch::optim::SGDOptions(0.05).momentum(0.9);
  std::vector<at::Tensor> trained;
  for (const auto& parameter : pair.plain->parameters()) {
    if (std::none_of(trained.begin(), trained.end(),
                     [&](const auto& each) { return each.is_same(parameter); })) {
      trained.push_back(parameter);
    }
  }
  torch::optim::SGD plain(trained, options), sharded(pair.shards->all(), options);
  for (int64_t step = 0; step < 3; ++step) {
    INFO("step " << step);
    plain.zero_grad();
    sharded.zero_grad();
    torch::manual_seed(step);
    const auto expected = pair.step_plain(loss, step);
    torch::manual_seed(step);
    const auto value = pair.step(loss, step);
    CHECK(same(value.detach(), expected.detach()));
    check_gradients(pair);
    plain.step();
    sharded.step();
    pair.units->changed();
  }
  check_values(pair);
}

void check_equal(const Make& make, const Loss& loss, const std::vector<std::string>& policy = {}) {
  const int64_t world = GENERATE(1, 2, 4, 7);
  UnitsOptions options;
  options.prefetch = GENERATE(0, 1, 2);
  options.release_after_forward = world != 2;
  options.keep_root = world != 4;
  INFO("world " << world << ", prefetch " << options.prefetch);
  Pair pair(make, world, options, policy);
  check_equal(pair, loss);
}

nn::Sequential mlp(int64_t layers = 3, int64_t width = 6) {
  nn::Sequential net;
  for (int64_t i = 0; i < layers; ++i) {
    net->push_back(nn::Linear(width, width));
    net->push_back(nn::Tanh());
  }
  return net;
}

at::Tensor rows_of(int64_t count, int64_t width) { return torch::rand({count, width}); }

at::Tensor mlp_loss(nn::Module& model, int64_t) {
  return model.as<nn::SequentialImpl>()->forward(rows_of(5, 6)).pow(2).mean();
}

// Blocks, tied embedding and head, buffers, a parameter without dimensions, and methods that are
// not forward().
struct BlockImpl : nn::Module {
  explicit BlockImpl(int64_t width)
      : norm(register_module("norm", nn::LayerNorm(nn::LayerNormOptions({width})))),
        up(register_module("up", nn::Linear(width, 4 * width))),
        down(register_module("down", nn::Linear(4 * width, width))),
        gain(register_parameter("gain", torch::tensor(0.5))) {}
  at::Tensor forward(const at::Tensor& x) {
    return x + gain * down(torch::dropout(torch::gelu(up(norm(x))), 0.1, is_training()));
  }
  nn::LayerNorm norm;
  nn::Linear up, down;
  at::Tensor gain;
};
TORCH_MODULE(Block);

// Reads the embedding's table as its own weight.
struct TiedHeadImpl : nn::Module {
  explicit TiedHeadImpl(const at::Tensor& table) : weight(register_parameter("weight", table)) {}
  at::Tensor forward(const at::Tensor& x) { return at::linear(x, weight); }
  at::Tensor weight;
};
TORCH_MODULE(TiedHead);

struct Model : nn::Module {
  explicit Model(int64_t depth = 3, int64_t width = 8, int64_t words = 11) {
    table = register_module("table", nn::Embedding(words, width));
    for (int64_t i = 0; i < depth; ++i) blocks->push_back(Block(width));
    register_module("blocks", blocks);
    norm = register_module("norm", nn::LayerNorm(nn::LayerNormOptions({width})));
    head = register_module("head", TiedHead(table->weight));
  }
  at::Tensor trunk(const at::Tensor& ids) {
    auto x = table(ids);
    for (const auto& block : *blocks) x = block->as<BlockImpl>()->forward(x);
    return x;
  }
  at::Tensor logits(const at::Tensor& ids) { return head(norm(trunk(ids))); }
  at::Tensor generate(at::Tensor ids, int64_t count) {
    const at::NoGradGuard no_grad;
    for (int64_t i = 0; i < count; ++i) {
      ids = torch::cat({ids, logits(ids).select(1, -1).argmax(-1, /*keepdim=*/true)}, 1);
    }
    return ids;
  }
  nn::Embedding table{nullptr};
  nn::ModuleList blocks;
  nn::LayerNorm norm{nullptr};
  TiedHead head{nullptr};
};

std::shared_ptr<nn::Module> make_model() { return std::make_shared<Model>(); }

at::Tensor model_loss(nn::Module& module, int64_t) {
  const auto ids = torch::randint(11, {2, 5});
  const auto logits = module.as<Model>()->logits(ids);
  return torch::cross_entropy_loss(logits.flatten(0, 1), ids.roll(1, 1).flatten());
}

// ---- Models of all sorts -----------------------------------------------------------------------

struct Convolutions : nn::Module {
  Convolutions() {
    a = register_module("a", nn::Conv2d(nn::Conv2dOptions(3, 5, 3).padding(1)));
    b = register_module("b", nn::Conv2d(nn::Conv2dOptions(5, 5, 3).padding(1)));
    norm = register_module("norm", nn::BatchNorm2d(5));
    out = register_module("out", nn::Linear(5, 2));
    b->weight.set_data(b->weight.contiguous(at::MemoryFormat::ChannelsLast));
  }
  nn::Conv2d a{nullptr}, b{nullptr};
  nn::BatchNorm2d norm{nullptr};
  nn::Linear out{nullptr};
};

struct Recurrent : nn::Module {
  Recurrent() {
    lstm = register_module("lstm", nn::LSTM(nn::LSTMOptions(4, 3).num_layers(2).dropout(0.2)));
    out = register_module("out", nn::Linear(3, 1));
  }
  nn::LSTM lstm{nullptr};
  nn::Linear out{nullptr};
};

// Reads its weights by views and by hand.
struct Views : nn::Module {
  Views() {
    weight = register_parameter("weight", torch::randn({6, 4}));
    twice = register_parameter("twice", torch::randn({4, 4}));
    scale = register_parameter("scale", torch::randn({4}));
    frozen = register_parameter("frozen", torch::randn({4, 4}), /*requires_grad=*/false);
    unused = register_parameter("unused", torch::randn({3}));
  }
  at::Tensor weight, twice, scale, frozen, unused;
};

at::Tensor views_loss(nn::Module& module, int64_t step) {
  auto& m = *module.as<Views>();
  const auto x = rows_of(5, 4);
  const auto parts = m.weight.split(2);
  auto y = torch::mm(x, m.weight.narrow(0, 1, 4).t());
  y = torch::mm(y, m.twice) + torch::mm(torch::tanh(y), m.twice.t());
  y = torch::mm(y * m.scale.unsqueeze(0).expand({5, 4}), m.frozen);
  y = torch::cat({y, torch::mm(x, torch::stack({parts[0], parts[2]}).flatten(0, 1).t())}, 1);
  y = y + m.weight.select(1, 2).index({torch::tensor({0, 3, 5, 5, 1, 2, 0, 4})});
  if (step == 1) y = y * m.unused.sum();
  return y.pow(2).mean() + at::linear(x, m.weight.as_strided({2, 4}, {8, 1}, 1)).sum();
}

}  // namespace

TEST_CASE("losses, gradients and weights are those of the model that is whole, bit by bit",
          "[param]") {
  SECTION("an MLP") {
    check_equal([] { return mlp().ptr(); }, mlp_loss);
  }
  SECTION("a transformer's feed-forward blocks with tied weights and dropout") {
    check_equal(make_model, model_loss);
  }
  SECTION("units inside of units") { check_equal(make_model, model_loss, {"Block", "Linear"}); }
  SECTION("convolutions, one of them channels-last, and batch norm") {
    check_equal([] { return std::make_shared<Convolutions>(); },
                [](nn::Module& module, int64_t) {
                  auto& m = *module.as<Convolutions>();
                  const auto x = torch::relu(m.b(torch::relu(m.a(torch::rand({2, 3, 6, 6})))));
                  return m.out(m.norm(x).mean({2, 3})).pow(2).mean();
                });
  }
  SECTION("an LSTM") {
    check_equal([] { return std::make_shared<Recurrent>(); },
                [](nn::Module& module, int64_t) {
                  auto& m = *module.as<Recurrent>();
                  const auto [y, state] = m.lstm->forward(torch::rand({5, 2, 4}));
                  return m.out(y).pow(2).mean() + std::get<1>(state).sum();
                });
  }
  SECTION("views, lists, frozen, unused and twice used parameters") {
    check_equal([] { return std::make_shared<Views>(); }, views_loss);
  }
}

TEST_CASE("an operator may read parameters of several units at once", "[param]") {
  check_equal([] { return mlp(4).ptr(); },
              [](nn::Module& module, int64_t) {
                std::vector<at::Tensor> weights;
                auto* const net = module.as<nn::SequentialImpl>();
                for (size_t i = 0; i < 8; i += 2) {
                  weights.push_back(net->at<nn::LinearImpl>(i).weight);
                }
                auto y = torch::mm(rows_of(3, 6), torch::mm(weights[0], weights[3].t()));
                y = torch::mm(y, torch::stack(weights).sum(0)) + torch::mm(y, weights[0]);
                return y.pow(2).mean() + torch::cat(weights).norm();
              });
}

TEST_CASE("a model generates the same words under no_grad, and nothing stays whole", "[param]") {
  Pair pair(make_model, 4);
  for (auto* const model : {&pair.plain, &pair.model}) (*model)->eval();
  const auto ids = torch::tensor({{1, 2}, {3, 4}});
  const auto expected = pair.plain->as<Model>()->generate(ids, 4);
  {
    const Scope use = pair.units->use(/*backward_follows=*/false);
    CHECK(same(pair.model->as<Model>()->generate(ids, 4), expected));
  }
  for (const auto& [name, parameter] : pair.backed()) CHECK_FALSE(parameter->is_whole());
  const c10::InferenceMode inference;
  const Scope use = pair.units->use(false);
  CHECK(same(pair.model->as<Model>()->generate(ids, 4), expected));
}

TEST_CASE("any method may be called, in any order, and several losses may run backward",
          "[param]") {
  Pair pair(make_model, 3);
  const auto ids = torch::tensor({{1, 2, 5}});
  const auto losses = [&](nn::Module& module) {
    auto& m = *module.as<Model>();
    const auto reversed = [&] {
      auto x = m.table(ids);
      for (size_t i = m.blocks->size(); i-- > 0;) x = m.blocks[i]->as<BlockImpl>()->forward(x);
      return x;
    };
    const auto a = m.trunk(ids), b = reversed();
    return std::vector<at::Tensor>{(a * b).sum(), m.logits(ids).logsumexp(-1).sum(),
                                   m.blocks[1]->as<BlockImpl>()->up(a).sum()};
  };
  for (auto* const model : {&pair.plain, &pair.model}) {
    torch::manual_seed(3);
    std::vector<at::Tensor> values;
    {
      const Scope use = pair.units->use(true);
      values = losses(**model);
    }
    values[0].backward({}, /*retain_graph=*/true);
    values[2].backward({}, /*retain_graph=*/true);
    (values[0] + values[1]).backward();
  }
  check_gradients(pair);
}

TEST_CASE(
    "each unit is gathered once in forward and once in backward, the last one and the root "
    "once in all",
    "[param]") {
  Pair pair(make_model, 2);  // root, blocks 0 to 2: units 0 to 3
  using Order = std::vector<int64_t>;
  pair.step(model_loss, 0);
  CHECK(pair.shards->take_gathered() == Order{0, 1, 2, 3, 2, 1});
  CHECK(pair.shards->reduced ==
        std::vector<std::pair<int64_t, size_t>>{{3, 7}, {2, 7}, {1, 7}, {0, 3}});
  pair.units->changed();
  pair.step(model_loss, 1);  // now gathered ahead, in the same order
  CHECK(pair.shards->take_gathered() == Order{0, 1, 2, 3, 2, 1});
}

TEST_CASE(
    "a unit is gathered before its use, ahead where that is known, and released when nothing "
    "of it is to come",
    "[param]") {
  UnitsOptions options;
  options.prefetch = GENERATE(0, 1);
  Pair pair(make_model, 2, options);
  const auto events = [&] {
    pair.shards->events.clear();
    pair.step(model_loss, 0);
    pair.units->changed();
    return pair.shards->events;
  };
  if (options.prefetch == 0) {
    const std::string expected =
        " +0 w0 +1 w1 -1 +2 w2 -2 +3 w3"  // the last one stays
        " g3 -3 +2 w2 g2 -2 +1 w1 g1 -1 g0 -0";
    CHECK(events() == expected);
    CHECK(events() == expected);
  } else {
    // Backward is taken for forward reversed until it was seen.
    const std::string backward = " +2 g3 -3 +1 w2 g2 -2 w1 g1 -1 g0 -0";
    CHECK(events() == " +0 w0 +1 w1 -1 +2 w2 -2 +3 w3" + backward);
    CHECK(events() == " +0 +1 w0 +2 w1 -1 +3 w2 -2 w3" + backward);
  }
}

TEST_CASE("the order of the last pass says what is gathered ahead", "[param]") {
  const auto ahead = [](int64_t prefetch, const std::vector<int64_t>& blocks) {
    UnitsOptions options;
    options.prefetch = prefetch;
    Pair pair(make_model, 2, options);
    const auto pass = [&] {
      const Scope use = pair.units->use(false);
      auto& m = *pair.model->as<Model>();
      auto x = torch::rand({1, 8});
      for (const auto i : blocks) {
        x = m.blocks[static_cast<size_t>(i)]->as<BlockImpl>()->forward(x);
      }
    };
    pass();
    pass();
    pair.shards->take_gathered();
    const Scope use = pair.units->use(false);
    pair.model->as<Model>()->blocks[static_cast<size_t>(blocks[0])]->as<BlockImpl>()->forward(
        torch::rand({1, 8}));
    return pair.shards->take_gathered();
  };
  using Order = std::vector<int64_t>;
  CHECK(ahead(0, {0, 1, 2}) == Order{1});
  CHECK(ahead(1, {0, 1, 2}) == Order{1, 2});
  CHECK(ahead(2, {0, 1, 2}) == Order{1, 2, 3});
  CHECK(ahead(1, {2, 0, 1}) == Order{3, 1});
  CHECK(ahead(2, {2, 1, 2, 0}) == Order{3, 2});  // and itself again, which is whole
}

TEST_CASE("between forward and backward only shards, the root and the last unit are in memory",
          "[param]") {
  LiveBytes::now();
  constexpr int64_t kWidth = 64, kDepth = 6;
  const int64_t bytes_of_block = 4 * (8 * kWidth * kWidth + 5 * kWidth + 2 * kWidth + 1);
  const bool mixed = GENERATE(false, true);
  std::optional<at::ScalarType> dtype;
  if (mixed) dtype = at::kBFloat16;
  torch::manual_seed(1);
  const auto before = LiveBytes::now();
  const auto model = std::make_shared<Model>(kDepth, kWidth);
  const auto of_model = LiveBytes::now() - before;
  CHECK(of_model > kDepth * bytes_of_block);
  LiveBytes::take_peak();
  auto keeper = std::make_unique<Shards>(4, dtype);
  Units units(plan_units(*model), std::move(keeper));
  // Every rank's shards are here, so all of the model's bytes, and nothing beside them.
  CHECK(LiveBytes::now() - before == of_model);
  CHECK(LiveBytes::take_peak() - before <= of_model + 4 * bytes_of_block);

  const auto live_between = [&](nn::Module& module, bool autocast, int64_t base) {
    torch::manual_seed(2);
    at::autocast::set_autocast_enabled(at::kCPU, autocast);
    const Scope use = units.use(true);
    const auto loss = model_loss(module, 0);
    at::autocast::set_autocast_enabled(at::kCPU, false);
    const auto live = LiveBytes::now() - base;
    loss.backward();
    return live;
  };
  const auto live = live_between(*model, mixed, LiveBytes::now());
  units.changed();

  torch::manual_seed(1);
  const auto plain = std::make_shared<Model>(kDepth, kWidth);
  const auto activations = live_between(*plain, false, LiveBytes::now());
  const int64_t of_root = of_model - kDepth * bytes_of_block;
  const auto gathered = (bytes_of_block + of_root) / (mixed ? 2 : 1);
  INFO("activations " << activations << ", gathered " << gathered << ", live " << live);
  if (mixed) {
    CHECK(live <= activations + gathered);  // activations are smaller too
  } else {
    // The bias of a linear layer is padded to a multiple of 4 rows, the table's 11 rows to 12.
    CHECK(live - activations >= gathered);
    CHECK(live - activations <= gathered + 4 * kWidth + 64);
  }
}

TEST_CASE("parameters kept in 16 bits under autocast give what autocast gives", "[param]") {
  const int64_t world = GENERATE(1, 4);
  Pair pair([] { return mlp().ptr(); }, world, {}, {}, at::kBFloat16);
  check_equal(pair, [](nn::Module& module, int64_t step) {
    at::autocast::set_autocast_enabled(at::kCPU, true);
    const auto loss = mlp_loss(module, step);
    at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(at::kCPU, false);
    return loss;
  });
  CHECK(pair.model->parameters()[0].scalar_type() == at::kBFloat16);
}

TEST_CASE("layers that are frozen, or half frozen, give the others' gradients", "[param]") {
  Pair pair(make_model, 2);
  for (auto* const model : {&pair.plain, &pair.model}) {
    auto& m = *(*model)->as<Model>();
    for (auto& parameter : m.blocks[1]->parameters()) parameter.requires_grad_(false);
    m.blocks[0]->as<BlockImpl>()->up->weight.requires_grad_(false);
    m.blocks[0]->as<BlockImpl>()->down->weight.requires_grad_(false);
    m.table->weight.requires_grad_(false);
  }
  for (int64_t step = 0; step < 2; ++step) {
    torch::manual_seed(step);
    pair.step_plain(model_loss, step);
    torch::manual_seed(step);
    pair.step(model_loss, step);
  }
  check_gradients(pair);
  for (const auto& [name, parameter] : pair.backed()) CHECK_FALSE(parameter->is_whole());
}

TEST_CASE("reading a parameter outside a step is refused with its name", "[param]") {
  Pair pair([] { return mlp().ptr(); }, 4);
  const auto weight = pair.model->parameters()[0];
  CHECK(weight.sizes() == at::IntArrayRef{6, 6});
  CHECK(weight.t().narrow(0, 1, 2).sizes() == at::IntArrayRef{2, 6});  // looks, and reads nothing
  CHECK(torch::zeros_like(weight).sum().item<float>() == 0);
  CHECK_THROWS_WITH(weight.t().sum(), Contains("\"0.weight\"") && Contains("in 4 shards") &&
                                          Contains("aten::sum") && Contains("outside a step"));
  CHECK_THROWS_WITH(pair.model->as<nn::SequentialImpl>()->forward(torch::rand({1, 6})),
                    Contains("outside a step"));
  CHECK_THROWS_WITH(whole(weight), Contains("whole()"));
  CHECK_THROWS_WITH(weight.data_ptr<float>(), Contains("not allocated"));
  const Scope use = pair.units->use(false);
  CHECK_NOTHROW(weight.sum());
}

TEST_CASE("writing a parameter in a step is refused, for what was written would be lost",
          "[param]") {
  Pair pair([] { return mlp().ptr(); }, 2);
  const Scope use = pair.units->use(true);
  const at::NoGradGuard no_grad;
  auto weight = pair.model->parameters()[0];
  for (int64_t again = 0; again < 2; ++again) {  // once it is whole as well
    CHECK_THROWS_WITH(weight.mul_(2), Contains("\"0.weight\"") && Contains("aten::mul_") &&
                                          Contains("would be lost"));
    CHECK_THROWS_WITH(weight.data().clamp_(0, 1), Contains("aten::clamp_"));
    CHECK_THROWS_WITH(weight[0].fill_(1), Contains("aten::fill_"));
    weight.sum();
  }
}

TEST_CASE("a whole scope shows every value, and keeps what is written where it was asked to",
          "[param]") {
  Pair pair(make_model, 3);
  const auto write = [](nn::Module& module) {
    const at::NoGradGuard no_grad;
    for (auto& parameter : module.parameters()) parameter.mul_(2).add_(1);
  };
  {
    const Scope whole = pair.units->whole();
    for (size_t i = 0; i < pair.plain->parameters().size(); ++i) {
      CHECK(same(pair.model->parameters()[i], pair.plain->parameters()[i]));
    }
    CHECK_THROWS_WITH(write(*pair.model), Contains("would be lost"));
  }
  check_values(pair);
  {
    const Scope whole = pair.units->whole(/*write=*/true);
    write(*pair.model);
    write(*pair.plain);
  }
  check_values(pair);
  CHECK_THROWS_WITH(write(*pair.model), Contains("would be lost"));

  int64_t most = 0;
  pair.units->for_each_whole(
      [&](Unit& unit) {
        int64_t count = 0;
        for (const auto& each : pair.units->units()) count += each->is_whole();
        most = std::max(most, count);
        const at::NoGradGuard no_grad;
        for (const auto& each : unit.parameters()) {
          auto parameter = each->parameter();
          parameter.add_(1);
        }
      },
      /*write=*/true);
  CHECK(most == 1);
  {
    const at::NoGradGuard no_grad;
    for (auto& [name, each] : pair.backed()) {
      auto parameter = *pair.plain->named_parameters().find(name);
      parameter.add_(1);
    }
  }
  check_values(pair);
}

TEST_CASE("a backward that throws leaves nothing for the next one", "[param]") {
  Pair pair(make_model, 2);
  const auto failing = [&](bool fails) {
    return [fails](nn::Module& module, int64_t) {
      auto& m = *module.as<Model>();
      auto x = m.trunk(torch::tensor({{1, 2}}));
      if (fails) {
        m.blocks[0]->as<BlockImpl>()->gain.register_hook(
            [](const at::Tensor&) -> void { throw std::runtime_error("no"); });
      }
      return m.head(m.norm(x)).sum();
    };
  };
  CHECK_THROWS_WITH(pair.step(failing(true), 0), Contains("no"));
  auto& gain = pair.model->as<Model>()->blocks[0]->as<BlockImpl>()->gain;
  torch::autograd::impl::clear_hooks(gain);
  for (const auto& shard : pair.shards->all()) {
    auto handle = shard;
    handle.mutable_grad().reset();
  }
  torch::manual_seed(1);
  pair.step(failing(false), 0);
  torch::manual_seed(1);
  pair.step_plain(failing(false), 0);
  check_gradients(pair);
}

TEST_CASE("backward through a graph from before an update is an error", "[param]") {
  Pair pair([] { return mlp().ptr(); }, 2);
  const Scope use = pair.units->use(true);
  const auto loss = mlp_loss(*pair.model, 0);
  pair.units->changed();
  CHECK_THROWS_WITH(loss.backward(), Contains("modified by an inplace operation"));
}

TEST_CASE("a parameter that was given other data is named at the next step", "[param]") {
  Pair pair([] { return mlp().ptr(); }, 2);
  auto bias = pair.model->parameters()[1];
  bias.set_data(torch::zeros(6));
  CHECK_THROWS_WITH(pair.units->use(true), Contains("\"0.bias\"") && Contains("set_data"));
}

TEST_CASE("after the end parameters are ordinary again, or cannot be read", "[param]") {
  Pair pair([] { return mlp().ptr(); }, 2);
  const auto parameters = pair.model->parameters();
  const auto& first = *pair.units->units()[1]->parameters()[0];
  const auto values = pair.shards->value(first);
  pair.units->units()[1]->parameters()[0]->restore(values);
  CHECK(same(parameters[0].detach(), values));
  pair.units.reset();
  parameters[0].sum().backward();
  CHECK(parameters[0].grad().defined());
  CHECK_THROWS_WITH(parameters[1].sum(), Contains("\"0.bias\"") && Contains("had ended"));
}
