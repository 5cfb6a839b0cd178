#include "lightning/nn/last_use.h"

#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/graph_task.h>

namespace lightning::nn {

bool has_saved_tensor_hooks() {
  return torch::autograd::Engine::get_default_engine().get_default_saved_variable_hooks() !=
         nullptr;
}

bool is_last_use(const at::Tensor& unpacked, bool hooked) {
  if (hooked || torch::autograd::get_current_graph_task_keep_graph()) return false;
  if (unpacked.use_count() != 2) return false;
  if (!unpacked.is_view()) return unpacked.storage().use_count() == 1;
  // As `logits.view({-1, V})` leaves them: the view keeps its base, and nobody else does.
  return unpacked.storage().use_count() == 2 && unpacked._base().use_count() == 1;
}

}  // namespace lightning::nn
