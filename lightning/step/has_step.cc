#include "lightning/step/has_step.h"

#include "lightning/module.h"
#include "lightning/overrides.h"

namespace lightning {

bool has_step(const LightningModule& module, Stage stage) {
  using Two = StepOutput (LightningModule::*)(const Batch&, int64_t);
  using Three = StepOutput (LightningModule::*)(const Batch&, int64_t, int64_t);
  using PredictTwo = Batch (LightningModule::*)(const Batch&, int64_t);
  using PredictThree = Batch (LightningModule::*)(const Batch&, int64_t, int64_t);
  const auto has = [&](auto... methods) { return (is_overridden(module, methods) || ...); };
  switch (stage) {
    case Stage::kFit:
      return has(&LightningModule::training_step);
    case Stage::kValidate:
      return has(static_cast<Two>(&LightningModule::validation_step),
                 static_cast<Three>(&LightningModule::validation_step));
    case Stage::kTest:
      return has(static_cast<Two>(&LightningModule::test_step),
                 static_cast<Three>(&LightningModule::test_step));
    default:
      return has(static_cast<PredictTwo>(&LightningModule::predict_step),
                 static_cast<PredictThree>(&LightningModule::predict_step),
                 &LightningModule::predict_forward);
  }
}

}  // namespace lightning
