#include "lightning/hooks.h"

namespace lightning {
namespace {

const char* const kNames[] = {
#define LIGHTNING_HOOK_NAME(name) #name,
    LIGHTNING_HOOKS(LIGHTNING_HOOK_NAME)
#undef LIGHTNING_HOOK_NAME
};

}  // namespace

const char* to_string(Hook hook) { return kNames[static_cast<int>(hook)]; }

Hook hook_of(const std::string& name) {
  int index = 0;
  for (const char* known : kNames) {
    if (name == known) return static_cast<Hook>(index);
    ++index;
  }
  return Hook::none;
}

LogRule log_rule(Hook hook) {
  switch (hook) {
    case Hook::training_step:
    case Hook::on_train_batch_start:
    case Hook::on_train_batch_end:
    case Hook::backward:
    case Hook::on_before_backward:
    case Hook::on_after_backward:
    case Hook::on_before_optimizer_step:
    case Hook::optimizer_step:
    case Hook::on_before_zero_grad:
    case Hook::optimizer_zero_grad:
    case Hook::configure_gradient_clipping:
    case Hook::clip_gradients:
      return {true, false, true, false};
    case Hook::validation_step:
    case Hook::test_step:
    case Hook::on_validation_batch_start:
    case Hook::on_validation_batch_end:
    case Hook::on_test_batch_start:
    case Hook::on_test_batch_end:
      return {true, false, false, true};
    case Hook::on_train_start:
    case Hook::on_train_epoch_start:
    case Hook::on_train_epoch_end:
    case Hook::on_validation_start:
    case Hook::on_validation_epoch_start:
    case Hook::on_validation_epoch_end:
    case Hook::on_test_start:
    case Hook::on_test_epoch_start:
    case Hook::on_test_epoch_end:
      return {true, true, false, true};
    default:
      return {false, false, false, false};
  }
}

}  // namespace lightning
