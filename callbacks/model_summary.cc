#include "callbacks/model_summary.h"

#include <c10/core/GradMode.h>

#include <utility>
#include <vector>

#include "lightning/errors.h"
#include "lightning/flop_counter.h"
#include "lightning/log.h"
#include "lightning/module.h"
#include "lightning/overrides.h"
#include "lightning/precision.h"
#include "lightning/registry.h"
#include "lightning/scope.h"
#include "lightning/strategy.h"
#include "lightning/trainer.h"

namespace lightning {
namespace {

const Registration<Callback> kModelSummary{
    "ModelSummary", "Prints layers, their parameters and modes when fit starts.",
    [](const ModelSummaryOptions& options) { return std::make_shared<ModelSummary>(options); }};

// Puts each submodule back into the mode it is in now.
Scope keep_modes(torch::nn::Module& root) {
  std::vector<std::pair<torch::nn::Module*, bool>> modes;
  for (const auto& module : root.modules()) modes.emplace_back(module.get(), module->is_training());
  return scope_exit([modes] {
    // train() of a module sets its children too; parents come first.
    for (const auto& [module, training] : modes) module->train(training);
  });
}

// Runs the module on its example input, as a prediction would.
FlopCounts flops_of_example(Trainer& trainer, LightningModule& module) {
  if (module.example_input_array.is_none()) return {};
  if (!is_overridden(module, &LightningModule::predict_forward)) {
    warn(
        "example_input_array is set, but the model overrides no predict_forward() to pass it to, "
        "so the summary shows no FLOPs.");
    return {};
  }
  Batch batch = trainer.precision().convert_input(module.example_input_array);
  batch = module.on_before_batch_transfer(std::move(batch), 0);
  batch = module.transfer_batch_to_device(std::move(batch), trainer.strategy().root_device(), 0);
  batch = module.on_after_batch_transfer(std::move(batch), 0);

  const Scope modes = keep_modes(module);
  module.eval();
  const c10::AutoGradMode no_grad(false);
  const Scope step = trainer.strategy().step_scope();
  const Scope context = trainer.precision().forward_context();
  return count_flops(module, [&] { module.predict_forward(batch); });
}

}  // namespace

ModelSummary::ModelSummary(const ModelSummaryOptions& options) : max_depth_(options.max_depth()) {
  if (max_depth_ < -1) {
    throw MisconfigurationError(str("ModelSummary got max_depth ", max_depth_,
                                    ", expected -1 (all layers), 0 (no summary) or more."));
  }
}

void ModelSummary::on_fit_start(Trainer& trainer, LightningModule& module) {
  if (max_depth_ == 0) return;
  // On every rank: a sharded model computes together.
  const FlopCounts flops = flops_of_example(trainer, module);
  if (!trainer.is_global_zero()) return;
  output_->write(
      format(summarize(module, max_depth_, trainer.precision().parameter_bits(), flops)));
}

std::string ModelSummary::format(const Summary& summary) const {
  return "\n" + format_summary(summary) + "\n";
}

}  // namespace lightning
