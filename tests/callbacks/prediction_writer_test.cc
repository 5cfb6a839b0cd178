#include "callbacks/prediction_writer.h"

#include <catch2/catch.hpp>

#include "lightning/data/data_loader.h"
#include "lightning/trainer.h"
#include "tests/support/boring.h"
#include "tests/support/temp_dir.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;

namespace {

struct Recorder : BasePredictionWriter {
  using BasePredictionWriter::BasePredictionWriter;

  void write_on_batch_end(Trainer&, LightningModule&, const Batch& prediction,
                          const Indices& batch_indices, const Batch& batch, int64_t batch_idx,
                          int64_t dataloader_idx) override {
    CHECK(prediction.tensor().size(0) == batch.tensor().size(0));
    lines.push_back(str("batch ", dataloader_idx, ".", batch_idx, ": ", text(batch_indices)));
  }
  void write_on_epoch_end(Trainer&, LightningModule&,
                          const std::vector<std::vector<Batch>>& predictions,
                          const std::vector<std::vector<Indices>>& batch_indices) override {
    for (size_t loader = 0; loader < predictions.size(); ++loader) {
      REQUIRE(predictions[loader].size() == batch_indices[loader].size());
      for (const auto& indices : batch_indices[loader]) {
        lines.push_back(str("epoch ", loader, ": ", text(indices)));
      }
    }
  }
  static std::string text(const Indices& indices) {
    std::vector<std::string> words;
    for (const int64_t index : indices) words.push_back(std::to_string(index));
    return join(words, " ");
  }

  std::vector<std::string> lines;
};

}  // namespace

TEST_CASE("a prediction writer gets each batch and the places of its samples", "[callbacks]") {
  const TempDir dir;
  auto writer = std::make_shared<Recorder>("batch");
  Trainer trainer(quiet(dir).callbacks({writer}));
  trainer.predict(std::make_shared<BoringModule>(),
                  Loaders(std::vector<Loaders>{random_loader(5), random_loader(3)}),
                  RunArguments().return_predictions(false));
  CHECK(writer->lines == std::vector<std::string>{"batch 0.0: 0 1", "batch 0.1: 2 3",
                                                  "batch 0.2: 4", "batch 1.0: 0 1",
                                                  "batch 1.1: 2"});
}

TEST_CASE("a prediction writer gets all predictions at the end, also unreturned", "[callbacks]") {
  const TempDir dir;
  auto writer = std::make_shared<Recorder>("batch_and_epoch");
  Trainer trainer(quiet(dir).callbacks({writer}));
  const auto returned = trainer.predict(std::make_shared<BoringModule>(), random_loader(3),
                                        RunArguments().return_predictions(false));
  CHECK(returned.empty());
  CHECK(writer->lines ==
        std::vector<std::string>{"batch 0.0: 0 1", "batch 0.1: 2", "epoch 0: 0 1", "epoch 0: 2"});
}

TEST_CASE("a prediction writer without its method says which to override", "[callbacks]") {
  struct Empty : BasePredictionWriter {
    using BasePredictionWriter::BasePredictionWriter;
  };
  const TempDir dir;
  Trainer trainer(quiet(dir).callbacks({std::make_shared<Empty>("batch")}));
  CHECK_THROWS_WITH(trainer.predict(std::make_shared<BoringModule>()),
                    Contains("Empty writes by batch but does not override write_on_batch_end"));
  CHECK_THROWS_WITH(Empty("epochs"), Contains("got write_interval \"epochs\"") &&
                                         Contains("Did you mean \"epoch\"?"));
}
