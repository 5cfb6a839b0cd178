#include "lightning/optim/torch_optimizers.h"

#include <torch/optim/adagrad.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/lbfgs.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>

#include "lightning/errors.h"
#include "lightning/optim/factories.h"

namespace lightning {
namespace {

using Params = std::vector<at::Tensor>;
using torch::optim::Optimizer;

// ---- Checks, before there are parameters --------------------------------------------------------

struct Checks {
  const char* optimizer;

  void at_least_0(const char* option, double value) const {
    if (value >= 0) return;
    throw MisconfigurationError(
        str(optimizer, " got ", option, " ", value, ", expected 0 or more."));
  }
  void at_least_1(const char* option, int64_t value) const {
    if (value >= 1) return;
    throw MisconfigurationError(
        str(optimizer, " got ", option, " ", value, ", expected 1 or more."));
  }
  void is_false(const char* option, bool value, const char* advice) const {
    if (!value) return;
    throw MisconfigurationError(str(optimizer, " got ", option,
                                    "=true, which LibTorch's optimizer "
                                    "cannot do. ",
                                    advice));
  }
  void betas(const std::vector<double>& betas) const {
    bool good = betas.size() == 2;
    std::vector<std::string> shown;
    for (const double beta : betas) {
      good = good && beta >= 0 && beta < 1;
      shown.push_back(str(beta));
    }
    if (good) return;
    throw MisconfigurationError(
        str(optimizer, " got betas [", join(shown), "], expected two numbers from 0 and below 1."));
  }
  template <class Config>
  void common(const Config& config) const {
    at_least_0("lr", config.lr());
    at_least_0("weight_decay", config.weight_decay());
    is_false("maximize", config.maximize(), "Minimize the negative loss instead.");
    is_false("differentiable", config.differentiable(), "Leave it out.");
  }
};

void check(const SGDConfig& config) {
  const Checks checks{"SGD"};
  checks.common(config);
  checks.at_least_0("momentum", config.momentum());
  if (config.nesterov() && (config.momentum() <= 0 || config.dampening() != 0)) {
    throw MisconfigurationError(str("SGD got nesterov with momentum ", config.momentum(),
                                    " and dampening ", config.dampening(),
                                    ", expected a momentum and no dampening."));
  }
}

template <class AnyAdamConfig>
void check_adam(const char* name, const AnyAdamConfig& config) {
  const Checks checks{name};
  checks.common(config);
  checks.betas(config.betas());
  checks.at_least_0("eps", config.eps());
}
void check(const AdamConfig& config) {
  check_adam("Adam", config);
  Checks{"Adam"}.is_false("decoupled_weight_decay", config.decoupled_weight_decay(),
                          "Write AdamW instead.");
}
void check(const AdamWConfig& config) { check_adam("AdamW", config); }

void check(const RMSpropConfig& config) {
  const Checks checks{"RMSprop"};
  checks.common(config);
  checks.at_least_0("alpha", config.alpha());
  checks.at_least_0("eps", config.eps());
  checks.at_least_0("momentum", config.momentum());
}

void check(const AdagradConfig& config) {
  const Checks checks{"Adagrad"};
  checks.common(config);
  checks.at_least_0("lr_decay", config.lr_decay());
  checks.at_least_0("initial_accumulator_value", config.initial_accumulator_value());
  checks.at_least_0("eps", config.eps());
}

void check(const LBFGSConfig& config) {
  const Checks checks{"LBFGS"};
  checks.at_least_0("lr", config.lr());
  checks.at_least_1("max_iter", config.max_iter());
  checks.at_least_1("history_size", config.history_size());
  if (config.line_search_fn() && *config.line_search_fn() != "strong_wolfe") {
    throw MisconfigurationError(str("LBFGS got line_search_fn \"", *config.line_search_fn(),
                                    "\", expected \"strong_wolfe\" or none."));
  }
}

template <class Config>
auto factory() {
  return [](const Config& config) {
    check(config);
    return OptimizerFactory::of(
        [config](Params params) { return make_optimizer(config, std::move(params)); });
  };
}

template <class AnyAdamOptions, class AnyAdamConfig>
AnyAdamOptions adam_options(const AnyAdamConfig& config) {
  return AnyAdamOptions(config.lr())
      .betas({config.betas()[0], config.betas()[1]})
      .eps(config.eps())
      .weight_decay(config.weight_decay())
      .amsgrad(config.amsgrad());
}

const Registration<OptimizerFactory> kOptimizers[] = {
    {"SGD", "Stochastic gradient descent, with momentum if wanted.", factory<SGDConfig>()},
    {"Adam", "Steps scaled by running means of gradients and of their squares.",
     factory<AdamConfig>()},
    {"AdamW", "Adam with weight decay apart from the gradients.", factory<AdamWConfig>()},
    {"RMSprop", "Steps scaled by a running mean of squared gradients.", factory<RMSpropConfig>()},
    {"Adagrad", "Steps scaled by the sum of squared gradients.", factory<AdagradConfig>()},
    {"LBFGS", "Quasi-Newton; needs a closure.", factory<LBFGSConfig>()},
};

}  // namespace

std::shared_ptr<Optimizer> make_optimizer(const SGDConfig& config, Params params) {
  check(config);
  return std::make_shared<torch::optim::SGD>(std::move(params),
                                             torch::optim::SGDOptions(config.lr())
                                                 .momentum(config.momentum())
                                                 .dampening(config.dampening())
                                                 .weight_decay(config.weight_decay())
                                                 .nesterov(config.nesterov()));
}

std::shared_ptr<Optimizer> make_optimizer(const AdamConfig& config, Params params) {
  check(config);
  return std::make_shared<torch::optim::Adam>(std::move(params),
                                              adam_options<torch::optim::AdamOptions>(config));
}

std::shared_ptr<Optimizer> make_optimizer(const AdamWConfig& config, Params params) {
  check(config);
  return std::make_shared<torch::optim::AdamW>(std::move(params),
                                               adam_options<torch::optim::AdamWOptions>(config));
}

std::shared_ptr<Optimizer> make_optimizer(const RMSpropConfig& config, Params params) {
  check(config);
  return std::make_shared<torch::optim::RMSprop>(std::move(params),
                                                 torch::optim::RMSpropOptions(config.lr())
                                                     .alpha(config.alpha())
                                                     .eps(config.eps())
                                                     .weight_decay(config.weight_decay())
                                                     .momentum(config.momentum())
                                                     .centered(config.centered()));
}

std::shared_ptr<Optimizer> make_optimizer(const AdagradConfig& config, Params params) {
  check(config);
  return std::make_shared<torch::optim::Adagrad>(
      std::move(params), torch::optim::AdagradOptions(config.lr())
                             .lr_decay(config.lr_decay())
                             .weight_decay(config.weight_decay())
                             .initial_accumulator_value(config.initial_accumulator_value())
                             .eps(config.eps()));
}

std::shared_ptr<Optimizer> make_optimizer(const LBFGSConfig& config, Params params) {
  check(config);
  return std::make_shared<torch::optim::LBFGS>(std::move(params),
                                               torch::optim::LBFGSOptions(config.lr())
                                                   .max_iter(config.max_iter())
                                                   .max_eval(config.max_eval())
                                                   .tolerance_grad(config.tolerance_grad())
                                                   .tolerance_change(config.tolerance_change())
                                                   .history_size(config.history_size())
                                                   .line_search_fn(config.line_search_fn()));
}

}  // namespace lightning
