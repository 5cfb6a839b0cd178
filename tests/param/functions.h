// Functions of a [4, 6] matrix, with operators of all sorts: in place, random, of lists, complex.
#pragma once

#include <torch/torch.h>

#include <functional>
#include <map>
#include <string>

namespace lightning {

inline std::map<std::string, std::function<at::Tensor(at::Tensor)>> functions_of_a_matrix() {
  namespace F = torch::nn::functional;
  torch::manual_seed(3);
  torch::nn::TransformerEncoderLayer encoder(
      torch::nn::TransformerEncoderLayerOptions(6, 2).dim_feedforward(8).dropout(0.2));
  torch::nn::GRU gru(6, 3);
  torch::nn::EmbeddingBag bag(6, 3);
  torch::nn::GroupNorm group(3, 6);
  torch::nn::Bilinear bilinear(6, 6, 2);
  const auto ids = torch::randint(6, {4, 3});
  return {
      {"encoder layer", [=](at::Tensor x) mutable { return encoder(x.unsqueeze(1)); }},
      {"gru", [=](at::Tensor x) mutable { return std::get<0>(gru(x.unsqueeze(1))); }},
      {"embedding bag",
       [=](at::Tensor x) mutable { return bag(ids).matmul(x.narrow(1, 0, 3).t()); }},
      {"group norm", [=](at::Tensor x) mutable { return group(x) * x; }},
      {"bilinear", [=](at::Tensor x) mutable { return bilinear(x, x.flip(0)); }},
      {"einsum",
       [](at::Tensor x) {
         return torch::einsum("ij,kj,kl->il", {x, x.exp(), x});
       }},
      {"fourier",
       [](at::Tensor x) {
         const auto y = torch::fft_fft(x);
         return at::real(y * y.conj()) + at::imag(y.pow(2)).abs() + at::abs(y.conj());
       }},
      {"sort", [](at::Tensor x) { return std::get<0>(x.exp().sort(1)).cumsum(1).log(); }},
      {"topk", [](at::Tensor x) { return std::get<0>(x.sin().topk(3)).pow(2); }},
      {"max and where",
       [](at::Tensor x) {
         const auto [largest, where] = x.exp().max(1, true);
         return torch::where(x > 0, x * largest, x.gather(1, where).expand({4, 6}).exp());
       }},
      {"scatter",
       [=](at::Tensor x) {
         return torch::zeros_like(x).scatter_add(1, ids, x.narrow(1, 0, 3).exp()).pow(2);
       }},
      {"index put",
       [](at::Tensor x) {
         auto y = x * 3;
         y.index_put_({torch::tensor({0, 2}), torch::tensor({1, 5})}, x[0][0] * 2);
         y.masked_fill_(x > 1, 3.0);
         return y.sin();
       }},
      {"index with none",
       [](at::Tensor x) {
         return x.exp()
             .index({torch::indexing::None, torch::indexing::Slice(), torch::tensor({0, 5, 5})})
             .pow(2);
       }},
      {"interpolate",
       [](at::Tensor x) {
         auto options =
             F::InterpolateFuncOptions().size(std::vector<int64_t>{9}).align_corners(false);
         return F::interpolate(x.exp().unsqueeze(0), options.mode(torch::kLinear)).sin();
       }},
      {"pool",
       [](at::Tensor x) {
         const auto y = torch::max_pool1d_with_indices(x.exp().unsqueeze(0), 2);
         return std::get<0>(y).sin() * std::get<1>(y);
       }},
      {"pad, roll, unfold",
       [](at::Tensor x) {
         return torch::constant_pad_nd(x.sin().roll(1, 0), {1, 2}).unfold(1, 3, 2).exp().sin();
       }},
      {"cdist", [](at::Tensor x) { return torch::cdist(x.exp(), x.flip(0)); }},
      {"norms",
       [](at::Tensor x) {
         return x.exp() / x.norm() +
                x.std(std::vector<int64_t>{1}, true, true) * x.logsumexp(1, true);
       }},
      {"weight norm",
       [](at::Tensor x) { return torch::_weight_norm(x.exp(), x.narrow(1, 0, 1).exp(), 0).sin(); }},
      {"solve",
       [](at::Tensor x) {
         const auto square = torch::mm(x, x.t()) + torch::eye(4);
         return std::get<0>(torch::linalg_solve_ex(square, x.exp())) +
                torch::linalg_cholesky(square).sum();
       }},
      {"foreach",
       [](at::Tensor x) {
         const auto y = torch::_foreach_mul({x.exp(), x.sin()}, 2.0);
         return torch::_foreach_add(y, {x, x.cos()})[1] * y[0];
       }},
      {"leaky and random relu",
       [](at::Tensor x) { return torch::rrelu(torch::leaky_relu(x * 2), 0.1, 0.9, true).pow(2); }},
      {"feature and alpha dropout",
       [](at::Tensor x) {
         return torch::alpha_dropout(torch::feature_dropout(x.exp(), 0.4, true), 0.3, true).sin();
       }},
      {"gumbel", [](at::Tensor x) { return F::gumbel_softmax(x.exp()).log(); }},
  };
}

}  // namespace lightning
