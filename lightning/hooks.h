// The hooks of a run by name, and what `log` may do in each.
// Source: Lightning 2.6, `_FxValidator`; the reference's section 7.1.
#pragma once

#include <cstdint>
#include <string>

namespace lightning {

// clang-format off
#define LIGHTNING_HOOKS(X)                                                                         \
  X(none) X(setup) X(teardown) X(configure_model) X(configure_optimizers) X(configure_callbacks)   \
  X(prepare_data) X(train_dataloader) X(val_dataloader) X(test_dataloader) X(predict_dataloader)   \
  X(on_fit_start) X(on_fit_end) X(on_sanity_check_start) X(on_sanity_check_end)                    \
  X(on_train_start) X(on_train_end) X(on_train_epoch_start) X(on_train_epoch_end)                  \
  X(on_train_batch_start) X(on_train_batch_end) X(training_step)                                   \
  X(on_before_batch_transfer) X(transfer_batch_to_device) X(on_after_batch_transfer)               \
  X(on_before_zero_grad) X(optimizer_zero_grad) X(on_before_backward) X(backward)                  \
  X(on_after_backward) X(on_before_optimizer_step) X(optimizer_step)                               \
  X(configure_gradient_clipping) X(clip_gradients) X(lr_scheduler_step)                            \
  X(on_validation_model_zero_grad) X(on_validation_model_eval) X(on_validation_model_train)        \
  X(on_validation_start) X(on_validation_end) X(on_validation_epoch_start)                         \
  X(on_validation_epoch_end) X(on_validation_batch_start) X(on_validation_batch_end)               \
  X(validation_step)                                                                               \
  X(on_test_model_eval) X(on_test_model_train) X(on_test_start) X(on_test_end)                     \
  X(on_test_epoch_start) X(on_test_epoch_end) X(on_test_batch_start) X(on_test_batch_end)          \
  X(test_step)                                                                                     \
  X(on_predict_model_eval) X(on_predict_start) X(on_predict_end) X(on_predict_epoch_start)         \
  X(on_predict_epoch_end) X(on_predict_batch_start) X(on_predict_batch_end) X(predict_step)        \
  X(on_save_checkpoint) X(on_load_checkpoint) X(state_dict) X(load_state_dict) X(on_exception)
// clang-format on

enum class Hook : uint8_t {
#define LIGHTNING_HOOK_NAME(name) name,
  LIGHTNING_HOOKS(LIGHTNING_HOOK_NAME)
#undef LIGHTNING_HOOK_NAME
};

const char* to_string(Hook hook);
// The hook of that name; none where there is no such.
Hook hook_of(const std::string& name);

// Whether `log` may be called in a hook, and its defaults there.
struct LogRule {
  bool allowed;
  bool epoch_only;  // on_step must be false and on_epoch true
  bool on_step;
  bool on_epoch;
};
LogRule log_rule(Hook hook);

}  // namespace lightning
