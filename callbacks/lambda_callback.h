// A callback made of functions, for one that is not worth a class.
//
//   LambdaHooks().on_train_start([](Trainer& trainer, LightningModule&) { trainer.print("go"); })
//
// Every hook of Callback can be given, with its arguments; those left out do nothing. Not in the
// registry: functions cannot come from YAML.
// Source: Lightning 2.6, `LambdaCallback`.
#pragma once

#include <functional>
#include <utility>

#include "lightning/callback.h"

// Name and arguments of each hook; a second list names the arguments, to pass them on.
#define LIGHTNING_RUN_HOOKS(HOOK) \
  HOOK(on_fit_start)              \
  HOOK(on_fit_end)                \
  HOOK(on_sanity_check_start)     \
  HOOK(on_sanity_check_end)       \
  HOOK(on_train_start)            \
  HOOK(on_train_end)              \
  HOOK(on_train_epoch_start)      \
  HOOK(on_train_epoch_end)        \
  HOOK(on_validation_start)       \
  HOOK(on_validation_end)         \
  HOOK(on_validation_epoch_start) \
  HOOK(on_validation_epoch_end)   \
  HOOK(on_test_start)             \
  HOOK(on_test_end)               \
  HOOK(on_test_epoch_start)       \
  HOOK(on_test_epoch_end)         \
  HOOK(on_predict_start)          \
  HOOK(on_predict_end)            \
  HOOK(on_predict_epoch_start)    \
  HOOK(on_predict_epoch_end)      \
  HOOK(on_after_backward)

#define LIGHTNING_ARGUMENT_HOOKS(HOOK)                                                             \
  HOOK(setup, (Stage a), (a))                                                                      \
  HOOK(teardown, (Stage a), (a))                                                                   \
  HOOK(on_train_batch_start, (const Batch& a, int64_t b), (a, b))                                  \
  HOOK(on_train_batch_end, (const StepOutput& a, const Batch& b, int64_t c), (a, b, c))            \
  HOOK(on_validation_batch_start, (const Batch& a, int64_t b, int64_t c), (a, b, c))               \
  HOOK(on_validation_batch_end, (const StepOutput& a, const Batch& b, int64_t c, int64_t d),       \
       (a, b, c, d))                                                                               \
  HOOK(on_test_batch_start, (const Batch& a, int64_t b, int64_t c), (a, b, c))                     \
  HOOK(on_test_batch_end, (const StepOutput& a, const Batch& b, int64_t c, int64_t d),             \
       (a, b, c, d))                                                                               \
  HOOK(on_predict_batch_start, (const Batch& a, int64_t b, int64_t c), (a, b, c))                  \
  HOOK(on_predict_batch_end, (const Batch& a, const Batch& b, int64_t c, int64_t d), (a, b, c, d)) \
  HOOK(on_before_zero_grad, (torch::optim::Optimizer & a), (a))                                    \
  HOOK(on_before_backward, (const at::Tensor& a), (a))                                             \
  HOOK(on_before_optimizer_step, (torch::optim::Optimizer & a), (a))                               \
  HOOK(on_exception, (const std::exception& a), (a))                                               \
  HOOK(on_save_checkpoint, (State & a), (a))                                                       \
  HOOK(on_load_checkpoint, (const State& a), (a))

#define LIGHTNING_UNWRAP_(...) __VA_ARGS__

namespace lightning {

class LambdaHooks {
 public:
#define LIGHTNING_SETTER_(name, ...)                                   \
  using name##_type = void(Trainer&, LightningModule&, ##__VA_ARGS__); \
  LambdaHooks& name(std::function<name##_type> function) {             \
    name##_ = std::move(function);                                     \
    return *this;                                                      \
  }                                                                    \
  const std::function<name##_type>& name() const { return name##_; }
#define LIGHTNING_ARGUMENT_SETTER_(name, arguments, values) \
  LIGHTNING_SETTER_(name, LIGHTNING_UNWRAP_ arguments)
  LIGHTNING_RUN_HOOKS(LIGHTNING_SETTER_)
  LIGHTNING_ARGUMENT_HOOKS(LIGHTNING_ARGUMENT_SETTER_)

 private:
#define LIGHTNING_MEMBER_(name, ...) std::function<name##_type> name##_;
  LIGHTNING_RUN_HOOKS(LIGHTNING_MEMBER_)
  LIGHTNING_ARGUMENT_HOOKS(LIGHTNING_MEMBER_)
};

class LambdaCallback : public Callback {
 public:
  explicit LambdaCallback(LambdaHooks hooks) : hooks_(std::move(hooks)) {}

#define LIGHTNING_CALL_(name)                                     \
  void name(Trainer& trainer, LightningModule& module) override { \
    if (hooks_.name()) hooks_.name()(trainer, module);            \
  }
#define LIGHTNING_ARGUMENT_CALL_(name, arguments, values)                                      \
  void name(Trainer& trainer, LightningModule& module, LIGHTNING_UNWRAP_ arguments) override { \
    if (hooks_.name()) hooks_.name()(trainer, module, LIGHTNING_UNWRAP_ values);               \
  }
  LIGHTNING_RUN_HOOKS(LIGHTNING_CALL_)
  LIGHTNING_ARGUMENT_HOOKS(LIGHTNING_ARGUMENT_CALL_)

 private:
  LambdaHooks hooks_;
};

#undef LIGHTNING_SETTER_
#undef LIGHTNING_ARGUMENT_SETTER_
#undef LIGHTNING_MEMBER_
#undef LIGHTNING_CALL_
#undef LIGHTNING_ARGUMENT_CALL_
#undef LIGHTNING_UNWRAP_
#undef LIGHTNING_RUN_HOOKS
#undef LIGHTNING_ARGUMENT_HOOKS

}  // namespace lightning
