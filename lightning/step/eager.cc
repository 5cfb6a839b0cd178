#include "lightning/registry.h"
#include "lightning/step/executor.h"

namespace lightning {
namespace {

class EagerExecutor : public StepExecutor {
 public:
  StepOutput run(TrainingStep& step, const Batch& batch) override { return step.run(batch); }
};

const Registration<StepExecutor> kEager{"eager", "Runs each step as it is written.",
                                        [] { return std::make_unique<EagerExecutor>(); }};

}  // namespace
}  // namespace lightning
