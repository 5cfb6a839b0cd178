// LibTorch's optimizers by name, with Python's option names and defaults, for configuration:
//
//   registry<OptimizerFactory>().names()    // "AdamW", "SGD", ...
//   make_optimizer(AdamWConfig().lr(3e-4), parameters)
//
// Python's switches for how it computes (foreach, fused, capturable, differentiable) are read, so
// that a configuration written by Python serves; they have no effect here, where the step is chosen
// by the framework. maximize, which would change the result, is refused.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "lightning/fwd.h"
#include "lightning/options.h"

namespace lightning {

struct SGDConfig : Options<SGDConfig> {
  OPTION(double, lr, 1e-3, "Learning rate.");
  OPTION(double, momentum, 0.0, "Part of the last update that is added to the next.");
  OPTION(double, dampening, 0.0, "Part of the gradient that momentum leaves out.");
  OPTION(double, weight_decay, 0.0, "Weights times this are added to the gradients.");
  OPTION(bool, nesterov, false, "Nesterov momentum; wants momentum and no dampening.");
  OPTION(bool, maximize, false, "Not available: must be false.");
  OPTION(std::optional<bool>, foreach, std::nullopt, "No effect.");
  OPTION(bool, differentiable, false, "Not available: must be false.");
  OPTION(std::optional<bool>, fused, std::nullopt, "No effect.");
};

struct AdamConfig : Options<AdamConfig> {
  OPTION(double, lr, 1e-3, "Learning rate.");
  OPTION(std::vector<double>, betas, (std::vector<double>{0.9, 0.999}),
         "Decay of the running means of the gradient and of its square.");
  OPTION(double, eps, 1e-8, "Added to the denominator.");
  OPTION(double, weight_decay, 0.0, "Weights times this are added to the gradients.");
  OPTION(bool, amsgrad, false, "Use the largest mean of squares so far.");
  OPTION(std::optional<bool>, foreach, std::nullopt, "No effect.");
  OPTION(bool, maximize, false, "Not available: must be false.");
  OPTION(bool, capturable, false, "No effect.");
  OPTION(bool, differentiable, false, "Not available: must be false.");
  OPTION(std::optional<bool>, fused, std::nullopt, "No effect.");
  OPTION(bool, decoupled_weight_decay, false, "Not available: write AdamW.");
};

struct AdamWConfig : Options<AdamWConfig> {
  OPTION(double, lr, 1e-3, "Learning rate.");
  OPTION(std::vector<double>, betas, (std::vector<double>{0.9, 0.999}),
         "Decay of the running means of the gradient and of its square.");
  OPTION(double, eps, 1e-8, "Added to the denominator.");
  OPTION(double, weight_decay, 1e-2, "Weights shrink by this part of the learning rate.");
  OPTION(bool, amsgrad, false, "Use the largest mean of squares so far.");
  OPTION(bool, maximize, false, "Not available: must be false.");
  OPTION(std::optional<bool>, foreach, std::nullopt, "No effect.");
  OPTION(bool, capturable, false, "No effect.");
  OPTION(bool, differentiable, false, "Not available: must be false.");
  OPTION(std::optional<bool>, fused, std::nullopt, "No effect.");
};

struct RMSpropConfig : Options<RMSpropConfig> {
  OPTION(double, lr, 1e-2, "Learning rate.");
  OPTION(double, alpha, 0.99, "Decay of the running mean of squares.");
  OPTION(double, eps, 1e-8, "Added to the denominator.");
  OPTION(double, weight_decay, 0.0, "Weights times this are added to the gradients.");
  OPTION(double, momentum, 0.0, "Part of the last update that is added to the next.");
  OPTION(bool, centered, false, "Divide by the variance rather than the mean of squares.");
  OPTION(bool, capturable, false, "No effect.");
  OPTION(std::optional<bool>, foreach, std::nullopt, "No effect.");
  OPTION(bool, maximize, false, "Not available: must be false.");
  OPTION(bool, differentiable, false, "Not available: must be false.");
};

struct AdagradConfig : Options<AdagradConfig> {
  OPTION(double, lr, 1e-2, "Learning rate.");
  OPTION(double, lr_decay, 0.0, "Decay of the learning rate.");
  OPTION(double, weight_decay, 0.0, "Weights times this are added to the gradients.");
  OPTION(double, initial_accumulator_value, 0.0, "Where the sum of squares begins.");
  OPTION(double, eps, 1e-10, "Added to the denominator.");
  OPTION(std::optional<bool>, foreach, std::nullopt, "No effect.");
  OPTION(bool, maximize, false, "Not available: must be false.");
  OPTION(bool, differentiable, false, "Not available: must be false.");
  OPTION(std::optional<bool>, fused, std::nullopt, "No effect.");
};

struct LBFGSConfig : Options<LBFGSConfig> {
  OPTION(double, lr, 1.0, "Learning rate.");
  OPTION(int64_t, max_iter, 20, "Iterations in a step.");
  OPTION(std::optional<int64_t>, max_eval, std::nullopt,
         "Evaluations in a step; 1.25 max_iter where none is given.");
  OPTION(double, tolerance_grad, 1e-7, "Gradient at which a step ends.");
  OPTION(double, tolerance_change, 1e-9, "Change of loss or parameters at which a step ends.");
  OPTION(int64_t, history_size, 100, "Updates that are remembered.");
  OPTION(std::optional<std::string>, line_search_fn, std::nullopt, "strong_wolfe or none.");
};

// Errors: MisconfigurationError for a value out of its range or one that is not available.
std::shared_ptr<torch::optim::Optimizer> make_optimizer(const SGDConfig& config,
                                                        std::vector<at::Tensor> params);
std::shared_ptr<torch::optim::Optimizer> make_optimizer(const AdamConfig& config,
                                                        std::vector<at::Tensor> params);
std::shared_ptr<torch::optim::Optimizer> make_optimizer(const AdamWConfig& config,
                                                        std::vector<at::Tensor> params);
std::shared_ptr<torch::optim::Optimizer> make_optimizer(const RMSpropConfig& config,
                                                        std::vector<at::Tensor> params);
std::shared_ptr<torch::optim::Optimizer> make_optimizer(const AdagradConfig& config,
                                                        std::vector<at::Tensor> params);
std::shared_ptr<torch::optim::Optimizer> make_optimizer(const LBFGSConfig& config,
                                                        std::vector<at::Tensor> params);

}  // namespace lightning
