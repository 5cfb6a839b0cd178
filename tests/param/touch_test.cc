#include "lightning/param/touch.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <functional>

#include "lightning/param/left_behind.h"
#include "tests/param/functions.h"

using Catch::Matchers::Contains;
using namespace lightning;

namespace {

// Keeps values elsewhere and makes the parameter whole at each touch.
struct Elsewhere : Backing {
  void before(Touch& touch) override {
    seen.push_back(touch.operator_name() + (touch.writes ? "!" : ""));
    if (touch.parameter.is_whole()) return;
    touch.parameter.allocate();
    auto memory = touch.parameter.memory();
    memory.copy_(make());
  }
  bool wants_results() const override { return results != nullptr; }
  void after(Touch& touch) override { results(touch); }

  std::function<at::Tensor()> make;
  std::function<void(Touch&)> results;
  std::vector<std::string> seen;
};

using Seen = std::vector<std::string>;

}  // namespace

TEST_CASE("an operator that reads a parameter or a view of it makes it whole first", "[param]") {
  const auto values = torch::rand({4, 3});
  Elsewhere backing;
  backing.make = [&] { return values; };
  auto weight = values.clone().requires_grad_();
  BackedParameter backed("layer.weight", weight, backing);
  CHECK(backed.is_whole());
  CHECK(torch::equal(backed.memory(), values));
  CHECK(backed_parameter(weight) == &backed);
  CHECK(backed_parameter(weight.t().detach()) == &backed);
  CHECK(backed_parameter(values) == nullptr);
  backing.seen.clear();

  backed.release();
  CHECK(weight.sizes() == values.sizes());
  CHECK(weight.requires_grad());
  CHECK(weight.is_leaf());
  const auto x = torch::rand({2, 3});
  const auto y = at::linear(x, weight);
  CHECK(torch::equal(y, at::linear(x, values)));
  CHECK(backing.seen.size() == 1);
  backed.release();
  y.sum().backward();  // x takes no gradient, so nothing reads the weight
  CHECK_FALSE(backed.is_whole());
  CHECK(weight.grad().defined());

  backing.seen.clear();
  const auto view = weight.detach().t().narrow(0, 1, 2).unsqueeze(0);
  CHECK(backing.seen.empty());
  CHECK(torch::equal(view.contiguous(), values.t().narrow(0, 1, 2).unsqueeze(0)));
  CHECK(backing.seen.size() == 1);
  backed.release();
  CHECK(torch::equal(torch::cat({weight.detach(), values}), torch::cat({values, values})));
  backed.release();
  CHECK(torch::equal(values.index({torch::tensor({1})}), weight.index({torch::tensor({1})})));
  backed.release();
  CHECK(weight.data()[2][1].item<float>() == values[2][1].item<float>());
  backed.release();
  CHECK(torch::equal(whole(weight.t()), values.t()));
}

TEST_CASE("operators of all sorts make a parameter whole, in forward and in backward", "[param]") {
  for (const auto& [name, function] : functions_of_a_matrix()) {
    INFO(name);
    const auto values = torch::randn({4, 6});
    const auto plain = values.clone().requires_grad_();
    auto weight = values.clone().requires_grad_();
    Elsewhere backing;
    backing.make = [&] { return values; };
    BackedParameter backed("w", weight, backing);
    backed.release();
    torch::manual_seed(7);
    const auto expected = function(plain);
    torch::manual_seed(7);
    const auto got = function(weight);
    CHECK(torch::equal(got, expected));
    CHECK(backed.is_whole());
    backed.release();
    expected.sum().backward();
    got.sum().backward();
    CHECK(torch::equal(weight.grad(), plain.grad()));
  }
}

TEST_CASE("writes are told even to a backing that is asleep", "[param]") {
  Elsewhere backing;
  auto weight = torch::rand({4});
  BackedParameter backed("w", weight, backing);
  backing.set_asleep(true);
  weight.sum();
  CHECK(backing.seen.empty());
  weight[1].fill_(2);
  at::add_out(weight, torch::ones(4), 1);
  weight.sum();
  CHECK(backing.seen == Seen{"aten::fill_!", "aten::add!"});
}

TEST_CASE("a backing sees operators, arguments and results, and may change them", "[param]") {
  // A product that contracts over half of a dimension, completed by the other half.
  const auto whole_weight = torch::rand({3, 6}), x = torch::rand({2, 6});
  Elsewhere backing;
  auto weight = whole_weight.narrow(1, 0, 3).clone();
  BackedParameter backed("w", weight, backing);
  at::Tensor left;
  backing.results = [&](Touch& touch) {
    CHECK(touch.op->schema().name() == "aten::mm");
    CHECK(touch.tensor.strides() == at::IntArrayRef{1, 3});  // transposed
    auto& result = touch.stack->back();
    left = result.toTensor();
    result = left + torch::mm(x.narrow(1, 3, 3), whole_weight.narrow(1, 3, 3).t());
  };
  const auto y = torch::mm(x.narrow(1, 0, 3), weight.t());
  CHECK(torch::allclose(y, torch::mm(x, whole_weight.t())));
  CHECK_FALSE(torch::allclose(left, y));
}

TEST_CASE("backings stack: one decodes what another gathers", "[param]") {
  const auto codes = torch::tensor({1, 2, 3, 4}, at::kByte);
  Elsewhere gather, decode;
  gather.make = [&] { return codes; };
  auto coded = codes.clone();
  BackedParameter backed_codes("w.codes", coded, gather);
  auto weight = torch::zeros(4).requires_grad_();
  BackedParameter backed("w", weight, decode);
  decode.make = [&] { return coded.to(at::kFloat) * 0.5; };
  backed.release();
  backed_codes.release();
  gather.seen.clear();

  const auto y = (weight * 2).sum();
  CHECK(y.item<float>() == 10);
  CHECK(gather.seen.size() == 1);
  y.backward();
  CHECK(torch::equal(weight.grad(), torch::full({4}, 2.0)));
}

TEST_CASE("a backed parameter shows the dtype and device asked for, padded in memory", "[param]") {
  Elsewhere backing;
  auto weight = torch::arange(10).view({5, 2}).to(at::kFloat).requires_grad_();
  const auto values = weight.detach().clone();
  BackedOptions options;
  options.dtype = at::kBFloat16;
  options.padded_rows = 8;
  BackedParameter backed("w", weight, backing, options);
  CHECK(weight.scalar_type() == at::kBFloat16);
  CHECK(weight.sizes() == values.sizes());
  CHECK(backed.memory().sizes() == at::IntArrayRef{8, 2});
  CHECK(backed.allocated_bytes() == 8 * 2 * 2);
  CHECK(torch::equal(backed.memory().narrow(0, 0, 5), values.to(at::kBFloat16)));
  CHECK(backed.memory().narrow(0, 5, 3).abs().sum().item<float>() == 0);
  weight.sum().backward();
  CHECK(weight.grad().scalar_type() == at::kBFloat16);

  auto born_empty = torch::empty({3, 2}, at::kMeta).requires_grad_();
  BackedOptions on_cpu;
  on_cpu.device = at::kCPU;
  BackedParameter filled("e", born_empty, backing, on_cpu);
  CHECK_FALSE(filled.is_whole());
  CHECK(born_empty.is_cpu());
  CHECK(born_empty.requires_grad());
  filled.give(torch::full({3, 2}, 7.0));
  (born_empty * 2).sum().backward();
  CHECK(torch::equal(born_empty.grad(), torch::full({3, 2}, 2.0)));
  CHECK(born_empty.data_ptr<float>()[5] == 7);
}

TEST_CASE("gradients can be taken as they arrive, after hooks that were there", "[param]") {
  Elsewhere backing;
  auto weight = torch::ones(3).requires_grad_();
  BackedParameter backed("w", weight, backing);
  std::vector<at::Tensor> taken;
  backed.on_gradient([] { throw std::runtime_error("replaced"); });
  backed.on_gradient([&] { taken.push_back(backed.take_gradient()); });
  for (int64_t i = 0; i < 2; ++i) (weight * weight + weight).sum().backward();
  CHECK(taken.size() == 2);
  CHECK(torch::equal(taken[1], torch::full({3}, 3.0)));
  CHECK_FALSE(weight.grad().defined());
  backed.on_gradient(nullptr);
  weight.sum().backward();
  CHECK(taken.size() == 2);
  CHECK(weight.grad().defined());
}

TEST_CASE("what a backing leaves is there after it, and goes with the parameter's data",
          "[param]") {
  const auto rest = std::make_shared<LeftBehind>();
  const auto holders = [&] { return rest.use_count() - 1; };
  Elsewhere backing;
  for (const bool replaces_data : {true, false}) {
    auto weight = torch::rand({4, 3});
    {
      const BackedParameter backed("layer.weight", weight, backing);
      leave_behind(weight, rest);
      CHECK(left_behind(weight) == nullptr);
    }
    CHECK(left_behind(weight) == rest);
    CHECK(holders() == 1);
    if (replaces_data) weight.set_data(torch::rand({4, 3}));
    if (!replaces_data) weight = at::Tensor();
    CHECK(left_behind(weight) == nullptr);
    CHECK(holders() == 0);
  }
  const auto ordinary = torch::rand({4, 3});
  leave_behind(ordinary, rest);
  CHECK(left_behind(ordinary) == nullptr);
}

TEST_CASE("a parameter cannot have two backings, nor a sparse one any", "[param]") {
  Elsewhere backing;
  auto weight = torch::ones(3);
  BackedParameter backed("a", weight, backing);
  CHECK_THROWS_WITH(BackedParameter("b", weight, backing),
                    Contains("\"b\"") && Contains("as \"a\""));
  CHECK_THROWS_WITH(BackedParameter("s", torch::ones({2, 2}).to_sparse(), backing),
                    Contains("\"s\"") && Contains("dense"));
}

TEST_CASE("Parameter::restore gives back an ordinary parameter", "[param]") {
  Elsewhere backing;
  auto weight = torch::ones(3).requires_grad_();
  {
    BackedParameter backed("w", weight, backing);
    CHECK(backed.is_in_place());
    backed.restore(torch::full({3}, 2.0));
    CHECK(backed_parameter(weight) == nullptr);
  }
  CHECK(backing.seen.empty());
  weight.sum().backward();
  CHECK(weight.sum().item<float>() == 6);
}
