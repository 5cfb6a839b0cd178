#include "lightning/nn/embedding.h"

#include <torch/torch.h>

#include <catch2/catch.hpp>

#include "tests/nn/gradients.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;

namespace {

at::Tensor plain(const Tensors& p, const at::Tensor& tokens) {
  return at::embedding(p.at("token"), tokens) + p.at("position").narrow(0, 0, tokens.size(1));
}

Tensors weights(int64_t vocabulary, int64_t positions, int64_t width,
                const at::TensorOptions& options) {
  return {{"token", torch::randn({vocabulary, width}, options).requires_grad_()},
          {"position", torch::randn({positions, width}, options).requires_grad_()}};
}

}  // namespace

TEST_CASE("Embedding is torch::nn::Embedding by another name", "[nn]") {
  const auto options = torch::nn::EmbeddingOptions(10, 4).padding_idx(3);
  nn::Embedding ours(options);
  torch::nn::Embedding original(options);
  CHECK(ours->named_parameters().keys() == original->named_parameters().keys());
  CHECK(ours->weight[3].abs().sum().item<double>() == 0);
  original->weight.set_data(ours->weight.detach().clone());
  const auto tokens = torch::tensor({{1, 3, 9}, {0, 3, 1}});
  const Autocast on(at::kCPU);
  const auto output = ours->forward(tokens);
  CHECK(output.scalar_type() == at::kFloat);  // the residual stream stays in float32
  CHECK(at::equal(output, original->forward(tokens)));
  output.sum().backward();
  original->forward(tokens).sum().backward();
  CHECK(at::equal(ours->weight.grad(), original->weight.grad()));
  CHECK(std::dynamic_pointer_cast<nn::EmbeddingImpl>(ours->clone()));
}

TEST_CASE("embed adds the embeddings of tokens and positions", "[nn]") {
  torch::manual_seed(1);
  const auto p = weights(11, 6, 5, at::kDouble);
  const auto tokens = torch::randint(11, {4, 6}, at::kLong);
  for (const auto& some : {tokens, tokens.narrow(1, 1, 3), tokens.t().narrow(1, 0, 2)}) {
    CAPTURE(some.sizes());
    const auto copies = copies_of(p, at::kDouble);
    const auto gradient = torch::randn({some.size(0), some.size(1), 5}, at::kDouble);
    const auto got = results_of(
        [&](const at::Tensor& x) { return nn::embed(x, p.at("token"), p.at("position")); }, p, some,
        gradient);
    const auto expected =
        results_of([&](const at::Tensor& x) { return plain(copies, x); }, copies, some, gradient);
    for (const auto& [name, value] : expected) CHECK(at::equal(got.at(name), value));
  }
}

TEST_CASE("embed says that rows are longer than there are positions", "[nn]") {
  const auto p = weights(11, 6, 5, at::kFloat);
  CHECK_THROWS_WITH(nn::embed(torch::zeros({1, 7}, at::kLong), p.at("token"), p.at("position")),
                    Contains("7 tokens") && Contains("6 positions"));
}

TEST_CASE("embed on a GPU gives what ATen gives", "[nn][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  torch::manual_seed(1);
  const auto dtype = GENERATE(at::kFloat, at::kBFloat16);
  const auto [vocabulary, positions, batch, time, width] =
      GENERATE(table<int64_t, int64_t, int64_t, int64_t, int64_t>(
          {{50304, 1024, 4, 1024, 768}, {100, 40, 3, 33, 17}, {7, 5, 1, 1, 8}}));
  const auto p =
      weights(vocabulary, positions, width, at::TensorOptions().dtype(dtype).device(torch::kCUDA));
  const auto tokens =
      torch::randint(vocabulary, {batch, time}, torch::dtype(at::kLong).device(torch::kCUDA));
  const auto gradient = torch::randn({batch, time, width}, torch::kCUDA);
  const auto copies = copies_of(p, dtype);
  const auto got =
      results_of([&](const at::Tensor& x) { return nn::embed(x, p.at("token"), p.at("position")); },
                 p, tokens, gradient);
  const auto expected =
      results_of([&](const at::Tensor& x) { return plain(copies, x); }, copies, tokens, gradient);
  for (const auto& [name, value] : expected) {
    CAPTURE(dtype, vocabulary, width, name, relative_error(got.at(name), value));
    // Sums in another order.
    const double rounding = dtype == at::kFloat ? 1e-6 : 3e-3;
    const double allowed = name == "output" ? 0 : name == "position" ? 1e-2 : rounding;
    CHECK(relative_error(got.at(name), value) <= allowed);
    CHECK(got.at(name).scalar_type() == dtype);
  }
}

TEST_CASE("on a GPU an Embedding has torch::nn::Embedding's values and both its derivatives",
          "[nn][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  torch::manual_seed(3);
  const auto dtype = GENERATE(at::kFloat, at::kBFloat16);
  auto torch_options = torch::nn::EmbeddingOptions(300, 24);
  const bool padded = GENERATE(false, true);
  if (padded) torch_options.padding_idx(7);
  nn::Embedding ours(torch_options);
  torch::nn::Embedding original(torch_options);
  ours->to(torch::kCUDA, dtype);
  original->to(torch::kCUDA, dtype);
  original->weight.set_data(ours->weight.detach().clone());
  const auto tokens = torch::randint(300, {5, 40}, torch::dtype(at::kLong).device(torch::kCUDA));
  const auto outer = torch::randn({5, 40, 24}, torch::kCUDA).to(dtype).requires_grad_();
  const auto run = [&](const at::Tensor& output, const at::Tensor& weight) {
    const auto first = torch::autograd::grad({output}, {weight}, {outer}, true, true)[0];
    const auto second = torch::autograd::grad({first.pow(2).sum()}, {outer})[0];
    output.backward(outer.detach());
    return Tensors{
        {"output", output}, {"first", first}, {"second", second}, {"plain", weight.grad()}};
  };
  const auto got = run(ours->forward(tokens), ours->weight);
  const auto expected = run(original->forward(tokens), original->weight);
  CAPTURE(dtype, padded);
  for (const auto& [name, value] : expected) {
    CAPTURE(name, relative_error(got.at(name), value));
    CHECK(relative_error(got.at(name), value) <= (dtype == at::kFloat ? 1e-6 : 3e-3));
  }
}

TEST_CASE("on a GPU embed sums the rows of tokens that come often, the same bits each time",
          "[nn][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  torch::manual_seed(2);
  const auto dtype = GENERATE(at::kFloat, at::kBFloat16);
  const auto [vocabulary, batch, time, width] = GENERATE(table<int64_t, int64_t, int64_t, int64_t>(
      {{1, 4, 1000, 64}, {2, 1, 33, 5}, {3, 2, 32, 768}, {40, 7, 100, 1030}, {500, 8, 512, 24}}));
  const auto options = at::TensorOptions().dtype(dtype).device(torch::kCUDA);
  const auto p = weights(vocabulary, time, width, options);
  // Few of the vocabulary come often: its squares.
  const auto tokens = (torch::rand({batch, time}, torch::kCUDA).pow(2) * vocabulary)
                          .to(at::kLong)
                          .clamp_max(vocabulary - 1);
  const auto gradient = torch::randn({batch, time, width}, torch::kCUDA).to(dtype);
  const auto run = [&] {
    return results_of(
        [&](const at::Tensor& x) { return nn::embed(x, p.at("token"), p.at("position")); }, p,
        tokens, gradient);
  };
  const auto got = run();
  CAPTURE(dtype, vocabulary, batch, time, width);
  const auto exact =
      at::zeros({vocabulary, width}, options.dtype(at::kDouble))
          .index_add(0, tokens.flatten(), gradient.to(at::kDouble).view({-1, width}));
  CHECK(relative_error(got.at("token"), exact) <= (dtype == at::kFloat ? 1e-6 : 3e-3));
  CHECK(at::equal(run().at("token"), got.at("token")));
}
