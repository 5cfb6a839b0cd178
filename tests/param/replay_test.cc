#include "lightning/param/replay.h"

#include <ATen/autocast_mode.h>
#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <functional>

#include "lightning/param/activation_checkpoint.h"
#include "tests/param/functions.h"
#include "tests/param/live_bytes.h"

using Catch::Matchers::Contains;
using namespace lightning;
namespace nn = torch::nn;

namespace {

// What two forwards and backwards, one with all in a region, leave behind.
struct Run {
  at::Tensor loss;
  std::vector<at::Tensor> gradients;
  double next_random;
  RegionCounts counts;
};

using Forward = std::function<at::Tensor(const std::vector<at::Tensor>&)>;

// `forward` of fresh leaves of these shapes.
Run run(const std::vector<std::vector<int64_t>>& shapes, const Forward& forward, bool region) {
  torch::manual_seed(5);
  take_region_counts();
  std::vector<at::Tensor> leaves;
  for (const auto& shape : shapes) leaves.push_back(torch::randn(shape).requires_grad_());
  // Leaves take no in-place operators; what comes from a layer before does.
  std::vector<at::Tensor> inputs;
  for (const auto& leaf : leaves) inputs.push_back(leaf * 1.5);
  Run run;
  run.loss = region ? checkpoint([&] { return forward(inputs); }) : forward(inputs);
  torch::rand(1);  // what is drawn after the region is no business of its replay
  run.loss.sum().backward();
  for (const auto& leaf : leaves) run.gradients.push_back(leaf.grad());
  run.next_random = torch::rand(1).item<double>();
  run.counts = take_region_counts();
  return run;
}

bool same(const at::Tensor& a, const at::Tensor& b) {
  if (!a.defined() || !b.defined()) return a.defined() == b.defined();
  return torch::equal(a, b);
}

// Equal, bit for bit, and replayed: gives what the region did.
RegionCounts check_equal(const std::vector<std::vector<int64_t>>& shapes, const Forward& forward,
                         int64_t replays = 1) {
  const auto expected = run(shapes, forward, false), got = run(shapes, forward, true);
  CHECK(same(got.loss.detach(), expected.loss.detach()));
  for (size_t i = 0; i < shapes.size(); ++i) {
    INFO("input " << i);
    CHECK(same(got.gradients[i], expected.gradients[i]));
  }
  CHECK(got.next_random == expected.next_random);
  CHECK(expected.counts.recorded == 0);
  CHECK(got.counts.recorded == 1);
  CHECK(got.counts.replayed == replays);
  return got.counts;
}

using Inputs = const std::vector<at::Tensor>&;

struct BlockImpl : nn::Module {
  explicit BlockImpl(int64_t width, double dropout = 0.1) : dropout(dropout) {
    norm1 = register_module("norm1", nn::LayerNorm(nn::LayerNormOptions({width})));
    qkv = register_module("qkv", nn::Linear(width, 3 * width));
    out = register_module("out", nn::Linear(width, width));
    norm2 = register_module("norm2", nn::LayerNorm(nn::LayerNormOptions({width})));
    up = register_module("up", nn::Linear(width, 4 * width));
    down = register_module("down", nn::Linear(4 * width, width));
  }
  at::Tensor forward(at::Tensor x) {
    const auto width = x.size(2), heads = int64_t{2};
    auto parts = qkv(norm1(x)).view({x.size(0), x.size(1), 3, heads, width / heads});
    parts = parts.permute({2, 0, 3, 1, 4});
    const auto attended = at::scaled_dot_product_attention(parts[0], parts[1], parts[2],
                                                           /*attn_mask=*/{}, 0.0, true);
    x = x +
        torch::dropout(out(attended.transpose(1, 2).reshape(x.sizes())), dropout, is_training());
    return x + torch::dropout(down(torch::gelu(up(norm2(x)))), dropout, is_training());
  }
  double dropout;
  nn::LayerNorm norm1{nullptr}, norm2{nullptr};
  nn::Linear qkv{nullptr}, out{nullptr}, up{nullptr}, down{nullptr};
};
TORCH_MODULE(Block);

struct GPT : nn::Module {
  GPT(int64_t depth, int64_t width) {
    table = register_module("table", nn::Embedding(17, width));
    for (int64_t i = 0; i < depth; ++i) blocks->push_back(Block(width));
    register_module("blocks", blocks);
    head = register_module("head", nn::Linear(width, 17));
  }
  at::Tensor loss(const at::Tensor& ids) {
    auto x = table(ids);
    for (const auto& block : *blocks) x = block->as<BlockImpl>()->forward(x);
    return torch::cross_entropy_loss(head(x).flatten(0, 1), ids.flatten());
  }
  nn::Embedding table{nullptr};
  nn::ModuleList blocks;
  nn::Linear head{nullptr};
};

at::Tensor by_address(const at::Tensor& x) {
  auto y = torch::empty_like(x);
  for (int64_t i = 0; i < x.numel(); ++i) y.data_ptr<float>()[i] = 2 * x.data_ptr<float>()[i];
  return y;
}

// The same in two kernels, of which the second works in place.
at::Tensor by_filling(const at::Tensor& x) {
  auto y = torch::empty_like(x);
  const auto element = [](const at::Tensor& tensor, int64_t i) -> float& {
    return tensor.data_ptr<float>()[i];
  };
  replayable({x, at::Tensor()}, {y, at::Tensor()}, [=](const auto& in, const auto& out) {
    CHECK_FALSE((in[1].defined() || out[1].defined()));
    for (int64_t i = 0; i < in[0].numel(); ++i) element(out[0], i) = element(in[0], i);
  });
  replayable({}, {y}, [=](const auto&, const auto& out) {
    for (int64_t i = 0; i < out[0].numel(); ++i) element(out[0], i) *= 2;
  });
  return y;
}

enum class Declared { kNot, kAsFunction, kAsFilling };

// Does its work without operators, as a layer of fused kernels.
struct Doubled : torch::autograd::Function<Doubled> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            Declared declared) {
    const auto y = doubled(x, declared);
    ctx->save_for_backward({y});
    return y.clone();
  }
  static at::Tensor doubled(const at::Tensor& x, Declared declared) {
    if (declared == Declared::kAsFilling) return by_filling(x);
    if (declared == Declared::kNot) return by_address(x);
    return replayable({x}, [](const std::vector<at::Tensor>& inputs) {
      return std::vector<at::Tensor>{by_address(inputs[0])};
    })[0];
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    return {grads[0] * 2 + ctx->get_saved_variables()[0], {}};
  }
};

}  // namespace

TEST_CASE("a region's gradients are those of an ordinary backward, bit for bit", "[param]") {
  SECTION("products, views and functions") {
    check_equal({{4, 6}, {6, 5}}, [](Inputs x) {
      const auto y = torch::tanh(torch::mm(x[0], x[1])).view({2, 2, 5}).transpose(1, 2);
      return torch::softmax(y.exp(), 1).narrow(2, 0, 1) * x[0].sum();
    });
  }
  SECTION("dropout, and numbers drawn by hand") {
    check_equal({{50, 6}}, [](Inputs x) {
      auto y = torch::dropout(x[0].exp(), 0.3, true);
      y = y * torch::rand({6}) + torch::randn_like(y) * y;
      return torch::dropout(y.sin(), 0.5, true) * torch::bernoulli(torch::full({50, 1}, 0.5));
    });
  }
  SECTION("numbers beside 16-bit tensors, and sparse tensors") {
    check_equal({{4, 4}}, [](Inputs x) {
      const auto y = (x[0].to(torch::kBFloat16) * 2.5 + 1).exp();
      const auto sparse = torch::eye(4).to_sparse();
      return torch::mm(sparse, y.to(torch::kFloat)).sin() * 0.5;
    });
  }
  SECTION("lists of tensors in and out") {
    check_equal({{6, 4}, {6, 4}}, [](Inputs x) {
      const auto parts = (x[0] * x[1]).split(2);
      const auto y = torch::cat({parts[2].exp(), parts[0], x[1].sin()});
      const auto z = torch::stack({y.sin(), y.cos()}).unbind(1);
      return z[0] * z[3].exp() + y.index({torch::tensor({0, 3, 3})}).prod();
    });
  }
  SECTION("in-place operators on the region's own tensors") {
    check_equal({{6, 4}}, [](Inputs x) {
      auto y = x[0] * 2;
      y.add_(1).mul_(x[0]);
      const auto z = y.sin();
      auto w = z * 3;
      w.narrow(0, 0, 2).mul_(0.5);
      w[5].zero_();
      return (w * 2).relu_() * w.cos();
    });
  }
  SECTION("in-place operators on what comes from outside") {
    check_equal({{6, 4}, {6, 4}}, [](Inputs x) {
      auto stream = x[0];
      for (int64_t i = 0; i < 3; ++i) stream.add_((stream + x[1]).sin().mul(x[1]));
      stream.narrow(0, 2, 2).mul_(2);
      return stream.exp();
    });
  }
  SECTION("batch norm, whose running statistics move once") {
    nn::BatchNorm1d norm(4), expected(4);
    const auto forward = [](nn::BatchNorm1d& norm) {
      return [&norm](Inputs x) { return norm(x[0].exp()).sin() * norm(x[0]); };
    };
    const auto a = run({{6, 4}}, forward(expected), false), b = run({{6, 4}}, forward(norm), true);
    CHECK(same(a.gradients[0], b.gradients[0]));
    CHECK(same(norm->weight.grad(), expected->weight.grad()));
    CHECK(same(norm->running_mean, expected->running_mean));
    CHECK(norm->num_batches_tracked.item<int64_t>() == 2);
    CHECK(b.counts.replayed == 1);
  }
  SECTION("an LSTM with dropout") {
    torch::manual_seed(1);
    nn::LSTM lstm(nn::LSTMOptions(4, 3).num_layers(2).dropout(0.5));
    check_equal({{5, 2, 4}}, [&](Inputs x) { return std::get<0>(lstm->forward(x[0].sin())); });
  }
  SECTION("convolutions and pooling") {
    nn::Conv2d conv(nn::Conv2dOptions(3, 4, 3).padding(1));
    check_equal({{2, 3, 8, 8}},
                [&](Inputs x) { return torch::max_pool2d(torch::relu(conv(x[0])), 2).pow(2); });
  }
  SECTION("choices made by a tensor's value") {
    check_equal({{4}}, [](Inputs x) {
      auto y = x[0].exp();
      for (int64_t i = 0; i < 3; ++i) y = y.sum().item<double>() > 5 ? y.sin() : y.cosh();
      return y;
    });
  }
  SECTION("autocast") {
    nn::Linear linear(6, 6);
    check_equal({{4, 6}}, [&](Inputs x) {
      at::autocast::set_autocast_enabled(at::kCPU, true);
      auto y = linear(torch::tanh(linear(x[0]))).to(at::kFloat).exp();
      at::autocast::clear_cache();
      at::autocast::set_autocast_enabled(at::kCPU, false);
      return y;
    });
  }
  SECTION("saved results that live on: there is nothing to compute") {
    check_equal(
        {{3, 4}}, [](Inputs x) { return x[0].exp(); }, /*replays=*/0);
  }
  SECTION("a transformer's block, of which most is dropped") {
    torch::manual_seed(1);
    Block block(8);
    const auto counts = check_equal({{2, 5, 8}}, [&](Inputs x) { return block->forward(x[0]); });
    INFO(counts.dropped << " dropped, " << counts.kept << " kept");
    CHECK(counts.dropped >= 12);
  }
}

TEST_CASE("operators of all sorts are replayed", "[param]") {
  for (const auto& [name, function] : functions_of_a_matrix()) {
    INFO(name);
    const auto forward = [&f = function](Inputs x) { return f(x[0]); };
    const auto expected = run({{4, 6}}, forward, false), got = run({{4, 6}}, forward, true);
    CHECK(same(got.loss.detach(), expected.loss.detach()));
    CHECK(same(got.gradients[0], expected.gradients[0]));
    CHECK(got.next_random == expected.next_random);
    CHECK(got.counts.dropped > 0);
    CHECK(got.counts.replayed == 1);
  }
}

TEST_CASE("what is filled by its address is kept, for no operator could make it anew", "[param]") {
  SECTION("a mask, from a factory") {
    check_equal({{3, 3}}, [](Inputs x) {
      auto mask = torch::zeros({3, 3});
      auto at = mask.accessor<float, 2>();
      for (int64_t i = 0; i < 3; ++i) at[i][i] = static_cast<float>(i + 1);
      return (x[0].exp() * mask).sin() * torch::tensor({0.5f, 2.0f, 3.0f}).exp();
    });
  }
  SECTION("the result of a kernel, in memory that an operator made") {
    check_equal({{3, 4}},
                [](Inputs x) { return Doubled::apply(x[0].exp(), Declared::kNot).sin(); });
  }
  SECTION("not where the kernel is declared") {
    const auto kept = run(
        {{3, 4}}, [](Inputs x) { return Doubled::apply(x[0].exp(), Declared::kNot).sin(); }, true);
    const auto declared = GENERATE(Declared::kAsFunction, Declared::kAsFilling);
    const auto counts =
        check_equal({{3, 4}}, [&](Inputs x) { return Doubled::apply(x[0].exp(), declared).sin(); });
    CHECK(counts.kept < kept.counts.kept);
  }
  SECTION("nor is what a kernel adds to a tensor from outside, which has it once") {
    const auto filled = torch::ones({4});
    check_equal({{4}}, [&](Inputs x) {
      const auto outside = filled.clone();
      const auto forward = [&] {
        replayable({x[0].detach()}, {outside}, [](const auto& in, const auto& out) {
          for (int64_t i = 0; i < 4; ++i) {
            out[0].template data_ptr<float>()[i] += in[0].template data_ptr<float>()[i];
          }
        });
        return (x[0].exp() * outside.exp()).sin();
      };
      const auto result = forward();
      CHECK(same(outside, 1 + x[0].detach()));
      return result;
    });
  }
  SECTION("memory that is filled by its address, and then written by operators") {
    check_equal({{4}}, [](Inputs x) {
      const auto part = torch::empty_like(x[0]), all = torch::empty_like(x[0]);
      for (int64_t i = 0; i < 4; ++i) part.data_ptr<float>()[i] = all.data_ptr<float>()[i] = 3;
      part.narrow(0, 1, 2).fill_(2);
      all.add_(x[0].detach());
      return x[0].exp() * part * all;
    });
  }
  SECTION("what an operator wrote before, where it is told") {
    check_equal({{4}}, [](Inputs x) {
      const auto y = x[0].detach() * 2;
      for (int64_t i = 0; i < 4; ++i) y.data_ptr<float>()[i] += 1;
      keep_for_replay(y);
      return x[0].exp() * y;
    });
  }
}

TEST_CASE("between forward and backward only what a region gives is in memory", "[param]") {
  LiveBytes::now();
  torch::manual_seed(1);
  constexpr int64_t kBytes = 4 * 8 * 64 * 64;  // of one activation
  std::vector<Block> blocks;
  for (int64_t i = 0; i < 4; ++i) blocks.push_back(Block(64));
  const auto x = torch::randn({8, 64, 64}).requires_grad_();
  const auto live = [&](bool regions, int64_t& peak) {
    const auto base = LiveBytes::now();
    auto y = x.sin();
    for (auto& block : blocks) {
      y = regions ? checkpoint([&] { return block->forward(y); }) : block->forward(y);
    }
    const auto live = LiveBytes::now() - base;
    LiveBytes::take_peak();
    y.sum().backward();
    peak = LiveBytes::take_peak() - base;
    return live;
  };
  int64_t peak = 0, plain_peak = 0;
  live(true, peak);  // the gradients' memory is there from now on
  const auto before = LiveBytes::now();
  const auto plain = live(false, plain_peak), with = live(true, peak);
  CHECK(LiveBytes::now() == before);  // a region ends with its graph
  INFO("live " << plain / kBytes << " and " << with / kBytes << ", peak " << plain_peak / kBytes
               << " and " << peak / kBytes);
  CHECK(plain > 4 * 15 * kBytes);
  CHECK(with >= 5 * kBytes);
  CHECK(with <= 6 * kBytes);  // inputs of the regions and the last output; states of the generator
  CHECK(peak < plain_peak / 2);
}

TEST_CASE("regions in regions are one, and a graph that is kept is replayed once", "[param]") {
  const auto x = torch::rand({3, 3}).requires_grad_();
  take_region_counts();
  const auto forward = [&] {
    const auto y = x.exp().sin();
    return checkpoint([&] { return y.cos().exp(); }) * y.exp();
  };
  const auto loss = checkpoint(forward).sum();
  loss.backward({}, /*retain_graph=*/true);
  loss.backward();
  const auto counts = take_region_counts();
  CHECK(counts.recorded == 1);
  CHECK(counts.replayed == 1);
  const auto got = x.grad().clone();
  x.mutable_grad().zero_();
  for (int64_t i = 0; i < 2; ++i) forward().sum().backward();
  CHECK(same(got, x.grad()));
  CHECK_THROWS_WITH(loss.backward(), Contains("second time"));
}

TEST_CASE("gradients of gradients go through a region", "[param]") {
  const auto gradient = [](bool region) {
    const auto x = torch::linspace(0, 1, 5).requires_grad_();
    const auto f = [&] { return x.sin().exp().pow(3); };
    const auto y = region ? checkpoint(f) : f();
    const auto first = torch::autograd::grad({y.sum()}, {x}, {}, true, /*create_graph=*/true)[0];
    first.pow(2).sum().backward();
    return x.grad();
  };
  CHECK(same(gradient(true), gradient(false)));
}

TEST_CASE("writing what a region needs before backward is an error that says so", "[param]") {
  SECTION("its input") {
    const auto x = torch::rand(3).requires_grad_();
    auto input = x * 2;
    const auto y = checkpoint([&] { return input.exp().sin(); });
    input.detach().add_(1);
    CHECK_THROWS_WITH(y.sum().backward(), Contains("lightning::checkpoint") &&
                                              Contains("modified by an inplace operation") &&
                                              Contains("[3]"));
  }
  SECTION("its result") {
    const auto x = torch::rand(3).requires_grad_();
    const auto y = checkpoint([&] { return x.sin().exp(); });
    y.detach().add_(1);
    CHECK_THROWS_WITH(y.sum().backward(), Contains("modified by an inplace operation"));
  }
  SECTION("in the region itself, as without one") {
    const auto x = torch::rand(3).requires_grad_();
    const auto y = checkpoint([&] {
      auto z = x * 2;
      const auto w = z.sin();
      z.add_(1);
      return w;
    });
    CHECK_THROWS_WITH(y.sum().backward(), Contains("modified by an inplace operation"));
  }
}

TEST_CASE("what a region throws is thrown, and the next one works", "[param]") {
  const auto x = torch::rand(3).requires_grad_();
  CHECK_THROWS_WITH(checkpoint([&]() -> at::Tensor {
                      x.exp().sin();
                      throw std::runtime_error("no");
                    }),
                    Contains("no"));
  CHECK_FALSE(recording_region());
  CHECK_THROWS_WITH(checkpoint([&] { return torch::mm(x.exp(), x); }), Contains("mat"));
  CHECK_FALSE(recording_region());
  checkpoint([&] { return x.exp().sin(); }).sum().backward();
  CHECK(torch::allclose(x.grad(), x.exp() * x.exp().cos()));
}

TEST_CASE("backward inside of a region ends it", "[param]") {
  const auto x = torch::rand(3).requires_grad_(), y = torch::rand(3).requires_grad_();
  checkpoint([&] {
    x.exp().sin().sum().backward();
    CHECK_FALSE(recording_region());
    return x;
  });
  y.exp().sin().sum().backward();
  CHECK(torch::allclose(x.grad(), (x.exp() * x.exp().cos()).detach()));
  CHECK(torch::allclose(y.grad(), (y.exp() * y.exp().cos()).detach()));
}
