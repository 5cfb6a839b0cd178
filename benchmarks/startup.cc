// Time from process start to the first training step of the Fashion-MNIST example: the example's
// own program with one more callback. The peer is startup.py.
//
//   startup fit --config examples/fashion_mnist/config.yaml
//     --trainer.callbacks "[{class_path: FirstStep}]"
//
// benchmarks/run.py gives the start in STARTED_NS (monotonic clock). Prints `startup_ms N`.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "lightning/callback.h"
#include "lightning/registry.h"

namespace lightning {
namespace {

class FirstStep : public Callback {
 public:
  void on_train_batch_start(Trainer&, LightningModule&, const Batch&, int64_t batch_idx) override {
    const char* started = std::getenv("STARTED_NS");
    if (batch_idx > 0 || started == nullptr) return;
    const std::chrono::nanoseconds now = std::chrono::steady_clock::now().time_since_epoch();
    std::printf("startup_ms %.1f\n", static_cast<double>(now.count() - std::atoll(started)) / 1e6);
  }
};

const Registration<Callback> kFirstStep{"FirstStep", "Prints when the first training step begins.",
                                        [] { return std::make_shared<FirstStep>(); }};

}  // namespace
}  // namespace lightning
