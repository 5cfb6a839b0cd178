#include "callbacks/lambda_callback.h"

#include <catch2/catch.hpp>

#include "lightning/trainer.h"
#include "tests/support/boring.h"
#include "tests/support/temp_dir.h"

using namespace lightning;
using namespace lightning::testing;

TEST_CASE("a lambda callback calls its functions with the hook's arguments", "[callbacks]") {
  const TempDir dir;
  std::vector<std::string> calls;
  auto callback = std::make_shared<LambdaCallback>(
      LambdaHooks()
          .setup([&](Trainer&, LightningModule&, Stage stage) {
            calls.push_back(str("setup ", to_string(stage)));
          })
          .on_train_start([&](Trainer& trainer, LightningModule&) {
            calls.push_back(str("train ", trainer.global_step()));
          })
          .on_train_batch_end([&](Trainer&, LightningModule&, const StepOutput& output,
                                  const Batch& batch, int64_t batch_idx) {
            CHECK(output.loss().defined());
            calls.push_back(str("batch ", batch_idx, " of ", batch.tensor().size(0)));
          })
          .on_after_backward([&](Trainer&, LightningModule&) { calls.push_back("backward"); }));
  Trainer trainer(quiet(dir).callbacks({callback}).max_steps(2));
  trainer.fit(std::make_shared<BoringModule>());
  CHECK(calls == std::vector<std::string>{"setup fit", "train 0", "backward", "batch 0 of 2",
                                          "backward", "batch 1 of 2"});
}
