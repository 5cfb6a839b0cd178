#include "lightning/hooks.h"

namespace lightning {

const char* to_string(Hook hook) {
  static const char* const names[] = {
#define LIGHTNING_HOOK_NAME(name) #name,
      LIGHTNING_HOOKS(LIGHTNING_HOOK_NAME)
#undef LIGHTNING_HOOK_NAME
  };
  return names[static_cast<int>(hook)];
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
