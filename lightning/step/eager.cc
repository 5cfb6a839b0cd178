#include "lightning/registry.h"
#include "lightning/step/executor.h"

namespace lightning {
namespace {

class EagerExecutor : public StepExecutor {
 public:
  void run(const Batch& batch, bool /*stepping*/,
           const std::function<void(const Batch&)>& step) override {
    step(batch);
  }
};

const Registration<StepExecutor> kEager{"eager", "Runs each step as it is written.",
                                        [] { return std::make_unique<EagerExecutor>(); }};

}  // namespace
}  // namespace lightning
