// Optimizers and schedules by name, for configuration: a part that is registered under "AdamW" is
// not an optimizer but what makes one once the parameters are there.
//
//   auto adam = registry<OptimizerFactory>().make("AdamW", config, "optimizer")->make(parameters);
//   auto step = registry<LRSchedulerFactory>().make("StepLR", config)->make(adam);
//
// One's own is registered with
//
//   const Registration<OptimizerFactory> kLion{"Lion", "Sign of a momentum.",
//       [](const LionConfig& config) {
//         return OptimizerFactory::of([config](std::vector<at::Tensor> params) {
//           return std::make_shared<Lion>(std::move(params), config.lr());
//         });
//       }};
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "lightning/optim/schedule.h"
#include "lightning/registry.h"

namespace lightning {

class OptimizerFactory {
 public:
  static constexpr const char* kPartKind = "optimizer";
  using Make = std::function<std::shared_ptr<torch::optim::Optimizer>(std::vector<at::Tensor>)>;

  explicit OptimizerFactory(Make make) : make_(std::move(make)) {}
  static std::shared_ptr<OptimizerFactory> of(Make make) {
    return std::make_shared<OptimizerFactory>(std::move(make));
  }

  std::shared_ptr<torch::optim::Optimizer> make(std::vector<at::Tensor> params) const {
    return make_(std::move(params));
  }

 private:
  Make make_;
};

class LRSchedulerFactory {
 public:
  static constexpr const char* kPartKind = "lr_scheduler";
  using Make = std::function<std::shared_ptr<LRScheduler>(const OptimizerRef&)>;

  explicit LRSchedulerFactory(Make make) : make_(std::move(make)) {}
  static std::shared_ptr<LRSchedulerFactory> of(Make make) {
    return std::make_shared<LRSchedulerFactory>(std::move(make));
  }

  std::shared_ptr<LRScheduler> make(const OptimizerRef& optimizer) const {
    return make_(optimizer);
  }

 private:
  Make make_;
};

// A factory of schedules of class S from its options, which a function `check(options)` looks at
// before there is an optimizer.
template <class S, class OptionsType>
auto schedule_factory() {
  return [](const OptionsType& options) {
    check(options);
    return LRSchedulerFactory::of([options](const OptimizerRef& optimizer) {
      return std::make_shared<S>(optimizer, options);
    });
  };
}

}  // namespace lightning
