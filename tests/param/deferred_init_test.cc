#include "lightning/param/deferred_init.h"

#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <chrono>
#include <functional>

#include "tests/param/live_bytes.h"
#include "tests/param/sharded.h"

using Catch::Matchers::Contains;
using namespace lightning;
namespace nn = torch::nn;
namespace init = torch::nn::init;

namespace {

using Make = std::function<std::shared_ptr<nn::Module>()>;

std::shared_ptr<nn::Module> make_deferred(DeferredInit& deferred, const Make& make) {
  const Scope scope = deferred.record();
  return make();
}

bool same(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.strides() == b.strides() && torch::equal(a, b);
}

// Parameters, buffers and the generator's next number, bit by bit.
void check_equal(const Make& make) {
  torch::manual_seed(3);
  const auto expected = make();
  const auto next = torch::rand(1).item<double>();

  torch::manual_seed(3);
  DeferredInit deferred;
  const auto module = make_deferred(deferred, make);
  const auto parameters = module->named_parameters();
  bool any = false;
  for (const auto& item : parameters) any |= deferred.is_deferred(item.value());
  CHECK(any);
  deferred.materialize(*module);
  CHECK(torch::rand(1).item<double>() == next);

  for (const auto& item : expected->named_parameters()) {
    INFO(item.key());
    CHECK(same(parameters[item.key()], item.value()));
    CHECK(parameters[item.key()].requires_grad() == item.value().requires_grad());
    CHECK(parameters[item.key()].is_leaf());
  }
  const auto buffers = module->named_buffers();
  for (const auto& item : expected->named_buffers()) {
    INFO(item.key());
    CHECK(same(buffers[item.key()], item.value()));
  }
}

// All sorts of initialisers.
struct Own : nn::Module {
  Own() {
    a = register_parameter("a", torch::randn({5, 4}) * 0.02 + torch::ones({4}).mul(3));
    b = register_parameter("b", torch::empty({6, 6}));
    init::orthogonal_(b, 0.5);
    c = register_parameter("c", torch::empty({6, 4}));
    init::xavier_normal_(c);
    const torch::NoGradGuard no_grad;
    c.select(0, 2).copy_(a[1].exp());
    c.narrow(0, 3, 2).zero_();
    d = register_parameter("d", torch::empty({3, 4}, torch::kDouble), /*requires_grad=*/false);
    init::kaiming_uniform_(d);
    d.clamp_(-0.3, 0.3);
    e = register_parameter("e", torch::zeros({4, 3}).t());
    e.copy_(torch::arange(12).view({3, 4}));
    tied = register_parameter("tied", a);
    half = register_parameter("half", b.detach().narrow(0, 0, 3));
    const auto position = torch::arange(7).to(torch::kFloat).unsqueeze(1);
    const auto rate = torch::exp(torch::arange(0, 4, 2) * (-std::log(10000.0) / 4));
    auto table = torch::zeros({7, 4});
    table.index_put_({torch::indexing::Slice(), torch::indexing::Slice(0, 4, 2)},
                     torch::sin(position * rate));
    table.slice(1, 1, 4, 2).copy_(torch::cos(position * rate));
    register_buffer("table", table);
    register_buffer("mask", torch::ones({4, 4}).tril().to(torch::kBool));
    register_buffer("literal", torch::tensor({0.5, 2.0, 3.0}) * 2);
    register_buffer("scaled", a.detach() * torch::tensor({1.0f, 2.0f, 3.0f, 4.0f}));
    register_buffer("order", torch::randperm(9));
    register_buffer("sorted", std::get<0>(torch::rand(5).sort()));
    torch::poisson(torch::rand(4) * 100);  // how much it draws depends on what was drawn before
    register_buffer("drawn", torch::multinomial(torch::ones(6), 3));
    register_buffer("normal", at::normal(torch::zeros(3), torch::ones(3)));
  }
  at::Tensor a, b, c, d, e, tied, half;
};

struct BlockImpl : nn::Module {
  explicit BlockImpl(int64_t width) {
    norm = register_module("norm", nn::LayerNorm(nn::LayerNormOptions({width})));
    up = register_module("up", nn::Linear(width, 4 * width));
    down = register_module("down", nn::Linear(4 * width, width));
  }
  nn::LayerNorm norm{nullptr};
  nn::Linear up{nullptr}, down{nullptr};
};
TORCH_MODULE(Block);

// Constructs, and initialises in a second and third round, as GPT-2 does.
struct GPT : nn::Module {
  GPT(int64_t depth, int64_t width, int64_t words, bool again = true) {
    table = register_module("table", nn::Embedding(words, width));
    for (int64_t i = 0; i < depth; ++i) blocks->push_back(Block(width));
    register_module("blocks", blocks);
    if (!again) return;
    apply([](nn::Module& module) {
      const torch::NoGradGuard no_grad;
      if (auto* const linear = module.as<nn::Linear>()) {
        linear->weight.normal_(0, 0.02);
        linear->bias.zero_();
      } else if (auto* const embedding = module.as<nn::Embedding>()) {
        embedding->weight.normal_(0, 0.02);
      }
    });
    for (auto& item : named_parameters()) {
      if (item.key().find("down.weight") != std::string::npos) {
        const torch::NoGradGuard no_grad;
        item.value().normal_(0, 0.02 / std::sqrt(2.0 * static_cast<double>(depth)));
      }
    }
  }
  nn::Embedding table{nullptr};
  nn::ModuleList blocks;
};

}  // namespace

TEST_CASE("a model that was born empty has the weights of an ordinary construction, bit by bit",
          "[param]") {
  SECTION("linear, convolution, embedding, norms") {
    check_equal([] {
      auto net = std::make_shared<nn::SequentialImpl>();
      net->push_back(nn::Linear(7, 5));
      net->push_back(nn::Linear(nn::LinearOptions(5, 3).bias(false)));
      net->push_back(nn::Conv2d(nn::Conv2dOptions(3, 4, 3).groups(1)));
      net->push_back(nn::ConvTranspose1d(nn::ConvTranspose1dOptions(3, 4, 3)));
      net->push_back(nn::Embedding(nn::EmbeddingOptions(9, 4).padding_idx(2)));
      net->push_back(nn::LayerNorm(nn::LayerNormOptions({4})));
      net->push_back(nn::BatchNorm2d(4));
      net->push_back(nn::GroupNorm(2, 4));
      net->push_back(nn::PReLU());
      net->push_back(nn::Bilinear(2, 3, 4));
      return net;
    });
  }
  SECTION("recurrent layers") {
    check_equal([] {
      return std::make_shared<nn::LSTMImpl>(nn::LSTMOptions(4, 3).num_layers(2).bidirectional(1));
    });
    check_equal([] { return std::make_shared<nn::GRUImpl>(nn::GRUOptions(4, 3)); });
  }
  SECTION("attention") {
    check_equal([] {
      return std::make_shared<nn::TransformerImpl>(
          nn::TransformerOptions(8, 2, 1, 1).dim_feedforward(16));
    });
  }
  SECTION("initialisers of its own, tied weights, views, arithmetic, buffers") {
    check_equal([] { return std::make_shared<Own>(); });
  }
  SECTION("two rounds of initialisation") {
    check_equal([] { return std::make_shared<GPT>(2, 4, 5); });
  }
  SECTION("another default dtype, which is no more when weights are made") {
    check_equal([] {
      torch::set_default_dtype(caffe2::TypeMeta::Make<double>());
      auto module = std::make_shared<Own>();
      torch::set_default_dtype(caffe2::TypeMeta::Make<float>());
      return module;
    });
  }
}

TEST_CASE("tied weights stay tied and views stay views", "[param]") {
  torch::manual_seed(3);
  DeferredInit deferred;
  const auto module = std::dynamic_pointer_cast<Own>(
      make_deferred(deferred, [] { return std::make_shared<Own>(); }));
  deferred.materialize(*module);
  CHECK(module->tied.is_same(module->a));
  const torch::NoGradGuard no_grad;
  module->b.fill_(4);
  CHECK(module->half.eq(4).all().item<bool>());
  CHECK_FALSE(deferred.is_deferred(module->a));
}

TEST_CASE("a constructor that asks for a value gets it", "[param]") {
  struct Asks : nn::Module {
    Asks() {
      const torch::NoGradGuard no_grad;
      a = register_parameter("a", torch::randn({4, 4}));
      const auto norm = a.norm().item<float>();
      b = register_parameter("b", torch::randn({norm > 0 ? 3 : 5}) / norm);
      if ((a > 0).any().item<bool>()) a.masked_fill_(a > 1, 0.5);
      register_buffer("positive", a.masked_select(a > 0));
      register_buffer("places", a.nonzero());
      a.index_put_({a > 0.25}, torch::tensor(0.25f));
      register_buffer("after", torch::rand(3));
    }
    at::Tensor a, b;
  };
  check_equal([] { return std::make_shared<Asks>(); });
}

TEST_CASE("a constructor makes literals with the options of another tensor", "[param]") {
  struct Alike : nn::Module {
    Alike() {
      const auto weight = register_parameter("weight", torch::rand({5, 4}));
      const auto options = weight.options().requires_grad(false);
      register_buffer("scalar", torch::tensor(2.5, options));
      register_buffer("one", torch::tensor(3, options.dtype(torch::kLong)));
      const auto row = torch::tensor({1.0, 2.0, 3.0, 4.0}, options);
      // Read again by the replays that give these values, after it was written.
      row.mul_(weight.sum().item<float>());
      row.add_(row.max().item<float>());
      register_buffer("row", row);
      init::sparse_(register_parameter("sparse", torch::empty({5, 4})), 0.4);
      register_buffer("after", torch::rand(3));
    }
  };
  check_equal([] { return std::make_shared<Alike>(); });
}

TEST_CASE("a constructor that seeds draws from that seed on", "[param]") {
  struct Seeds : nn::Module {
    Seeds() {
      register_parameter("before", torch::rand(3));
      torch::manual_seed(11);
      register_parameter("behind", torch::rand(3));
    }
  };
  check_equal([] { return std::make_shared<Seeds>(); });
}

TEST_CASE("generators that were used or seeded since are left alone", "[param]") {
  torch::manual_seed(3);
  DeferredInit deferred;
  const auto module = make_deferred(deferred, [] { return std::make_shared<GPT>(1, 4, 5); });
  torch::manual_seed(4);
  const auto drawn = torch::rand(2);
  deferred.materialize(*module);
  const auto next = torch::rand(2);
  torch::manual_seed(4);
  CHECK(torch::equal(torch::rand(2), drawn));
  CHECK(torch::equal(torch::rand(2), next));
  torch::manual_seed(3);
  const GPT expected(1, 4, 5);
  CHECK(torch::equal(module->parameters()[0], expected.parameters()[0]));
}

TEST_CASE("models may be constructed one after another, and converted while they are empty",
          "[param]") {
  const auto make = [] {
    const auto model = std::make_shared<GPT>(1, 4, 5);
    model->to(torch::kBFloat16);
    return model;
  };
  torch::manual_seed(3);
  const auto first = make(), second = make();
  torch::manual_seed(3);
  DeferredInit deferred;
  const auto a = make_deferred(deferred, make);
  const auto b = make_deferred(deferred, make);
  deferred.materialize(*a);
  const auto c = make_deferred(deferred, make);
  deferred.materialize(*b);
  for (size_t i = 0; i < first->parameters().size(); ++i) {
    CHECK(same(a->parameters()[i], first->parameters()[i]));
    CHECK(same(b->parameters()[i], second->parameters()[i]));
  }
  c->to(torch::kFloat);  // too late
  CHECK_THROWS_WITH(deferred.materialize(*c),
                    Contains("\"table.weight\"") && Contains("inside of the recording"));
}

TEST_CASE("what is constructed after generators were used draws from where they are then",
          "[param]") {
  const auto make = [] { return std::make_shared<GPT>(1, 4, 5); };
  torch::manual_seed(3);
  DeferredInit deferred;
  const auto first = make_deferred(deferred, make);
  torch::manual_seed(5);
  const auto second = make_deferred(deferred, make);
  torch::rand(7);  // of no concern to those, which have not drawn yet
  const auto third = make_deferred(deferred, make);
  const auto between = torch::rand(2);
  for (const auto& model : {second, first, third}) deferred.materialize(*model);
  const auto check_drawn = [&](const nn::Module& model) {
    const auto expected = make();
    for (size_t i = 0; i < model.parameters().size(); ++i) {
      CHECK(torch::equal(model.parameters()[i], expected->parameters()[i]));
    }
  };
  torch::manual_seed(3);
  check_drawn(*first);
  torch::manual_seed(5);
  check_drawn(*second);
  torch::manual_seed(5);
  torch::rand(7);
  check_drawn(*third);
  torch::manual_seed(5);
  torch::rand(7);
  CHECK(torch::equal(torch::rand(2), between));
}

TEST_CASE("a default device is where tensors are made that are told none", "[param]") {
  const at::Tensor elsewhere = torch::ones({2});
  {
    const Scope scope = default_device_scope(at::kMeta);
    CHECK(torch::zeros({3}).is_meta());
    CHECK(torch::randn({3}).is_meta());
    CHECK(torch::arange(3).is_meta());
    CHECK(torch::nn::Linear(2, 3)->weight.is_meta());
    CHECK(torch::zeros({3}, torch::kCPU).is_cpu());
    CHECK(torch::tensor({1, 2}).is_cpu());
    CHECK(torch::zeros_like(elsewhere).is_cpu());
    CHECK((elsewhere * 2).is_cpu());
    CHECK(elsewhere.new_zeros({2}).is_cpu());
    {
      const Scope inner = default_device_scope(at::kCPU);
      CHECK(torch::zeros({3}).is_cpu());
    }
    CHECK(torch::zeros({3}).is_meta());
    DeferredInit deferred;
    at::Tensor empty;
    {
      const Scope record = deferred.record();
      empty = torch::ones({3});
    }
    at::Tensor value;
    deferred.materialize({empty},
                         [&](const at::Tensor&, const at::Tensor& values) { value = values; });
    CHECK(value.is_cpu());
    CHECK(torch::zeros({3}).is_meta());
  }
  CHECK(torch::zeros({3}).is_cpu());
}

TEST_CASE("8 billion parameters are built at once, with no memory", "[param]") {
  LiveBytes::now();
  LiveBytes::take_peak();
  const auto before = LiveBytes::now();
  DeferredInit deferred;
  std::vector<double> milliseconds;
  for (int64_t i = 0; i < 3; ++i) {
    const auto start = std::chrono::steady_clock::now();
    const auto module =
        make_deferred(deferred, [] { return std::make_shared<GPT>(60, 4096, 50000); });
    milliseconds.push_back(
        std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
            .count());
    int64_t count = 0;
    for (const auto& parameter : module->parameters()) count += parameter.numel();
    CHECK(count > 8'000'000'000);
  }
  INFO("built in " << milliseconds[0] << ", " << milliseconds[1] << ", " << milliseconds[2]
                   << " ms");
  CHECK(LiveBytes::take_peak() - before < 1 << 20);
}

TEST_CASE("values are given one after another, and no two are held", "[param]") {
  LiveBytes::now();
  constexpr int64_t kWidth = 64, kLargest = 4 * 4 * kWidth * kWidth;
  const bool again = GENERATE(false, true);
  torch::manual_seed(3);
  const GPT expected(6, kWidth, 11, again);
  torch::manual_seed(3);
  DeferredInit deferred;
  const auto module =
      make_deferred(deferred, [&] { return std::make_shared<GPT>(6, kWidth, 11, again); });
  const auto before = LiveBytes::now();
  LiveBytes::take_peak();
  int64_t taken = 0;
  const auto names = module->named_parameters();
  deferred.materialize(module->parameters(),
                       [&](const at::Tensor& tensor, const at::Tensor& values) {
                         for (const auto& item : names) {
                           if (!item.value().is_same(tensor)) continue;
                           ++taken;
                           CHECK(torch::equal(values, expected.named_parameters()[item.key()]));
                         }
                       });
  CHECK(taken == static_cast<int64_t>(names.size()));
  CHECK(LiveBytes::take_peak() - before < 2 * kLargest + 32768);
  CHECK(LiveBytes::now() - before < 8192);  // states of the generator
}

TEST_CASE("a model that is born empty goes straight into shards", "[param]") {
  torch::manual_seed(3);
  const GPT expected(2, 8, 11);
  torch::manual_seed(3);
  DeferredInit deferred;
  const auto module = make_deferred(deferred, [] { return std::make_shared<GPT>(2, 8, 11); });

  auto keeper = std::make_unique<Shards>(3);
  auto* const shards = keeper.get();
  const auto names = module->named_parameters();
  deferred.materialize(module->parameters(),
                       [&](const at::Tensor& tensor, const at::Tensor& values) {
                         for (const auto& item : names) {
                           if (item.value().is_same(tensor)) shards->born(item.key(), values);
                         }
                       });
  CHECK(module->parameters()[0].is_meta());
  Units units(plan_units(*module), std::move(keeper));
  CHECK(module->parameters()[0].is_cpu());
  const Scope whole = units.whole();
  for (const auto& item : expected.named_parameters()) {
    INFO(item.key());
    CHECK(torch::equal(names[item.key()], item.value()));
  }
}

TEST_CASE("what cannot wait is refused with what to do", "[param]") {
  DeferredInit deferred;
  const auto outside = torch::ones(3);
  const Scope scope = deferred.record();
  CHECK_THROWS_WITH(outside.clone().normal_(), Contains("aten::normal_") && Contains("draws"));
  auto literal = torch::tensor({1.0f, 2.0f, 3.0f});
  CHECK_THROWS_WITH(literal.copy_(torch::rand(3)), Contains("aten::copy_") && Contains("[3]"));
  CHECK_THROWS_WITH(torch::zeros(3).data_ptr<float>(), Contains("not allocated"));
  CHECK_THROWS_WITH(torch::mm(torch::ones({2, 3}), torch::ones({2, 3})), Contains("2x3"));
  DeferredInit other;
  CHECK_THROWS_WITH(other.record(), Contains("inside of another"));
}
