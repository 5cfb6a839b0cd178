// For clone() of a layer that derives from one of torch::nn, whose own would make a torch::nn one.
#pragma once

#include <torch/nn/module.h>

namespace lightning::nn {

// Gives `to`, a layer of the same options, copies of the parameters of `from`, on `device` if one
// is given, and its mode.
inline void copy_parameters(const torch::nn::Module& from, torch::nn::Module& to,
                            const std::optional<torch::Device>& device) {
  const torch::NoGradGuard no_grad;
  to.train(from.is_training());
  auto places = to.named_parameters(/*recurse=*/false);
  for (const auto& item : from.named_parameters(/*recurse=*/false)) {
    const auto& value = item.value();
    const bool moves = device && value.device() != *device;
    auto& place = places[item.key()];
    place.set_data(moves ? value.to(*device) : value.clone());
    place.set_requires_grad(value.requires_grad());
  }
}

}  // namespace lightning::nn
