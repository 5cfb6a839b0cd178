#include "lightning/data/torch_dataset.h"

#include <torch/torch.h>

#include <atomic>
#include <catch2/catch.hpp>

#include "lightning/data/data_loader.h"

namespace lightning {
namespace {

namespace datasets = torch::data::datasets;
using torch::data::Example;
using torch::data::TensorExample;
using torch::data::transforms::Stack;

struct Squares : datasets::Dataset<Squares> {
  explicit Squares(std::atomic<int>* copies = nullptr) : copies(copies) {}
  Squares(const Squares& other) : copies(other.copies) {
    if (copies != nullptr) ++*copies;
  }
  Example<> get(size_t index) override {
    const auto i = static_cast<double>(index);
    return {torch::tensor({i, i * i}), torch::tensor(static_cast<int64_t>(index))};
  }
  std::optional<size_t> size() const override { return 10; }
  std::atomic<int>* copies;
};

struct Words : datasets::Dataset<Words, Example<std::string, int>> {
  Example<std::string, int> get(size_t index) override {
    return {str("word ", index), static_cast<int>(index)};
  }
  std::optional<size_t> size() const override { return 3; }
};

TEST_CASE("a torch data set gives lists of data and target, stacked or not", "[data]") {
  const int64_t workers = GENERATE(0, 2);
  const auto check = [](DataLoader loader) {
    CHECK(loader.size() == 3);
    const auto pass = loader.iterate();
    pass->next();
    const auto batch = pass->next();
    CHECK(torch::equal((*batch)[0][1], torch::tensor({5.0, 25.0})));
    CHECK(torch::equal((*batch)[1], torch::tensor({4, 5, 6, 7})));
    CHECK(pass->next()->at(1).tensor().size(0) == 2);
  };
  const auto options = DataLoaderOptions(4).num_workers(workers);
  check(DataLoader(Squares(), options));
  check(DataLoader(Squares().map(Stack<>()), options));
  check(DataLoader(datasets::make_shared_dataset<Squares>(), options));
}

TEST_CASE("samples of a torch data set can be taken one by one", "[data]") {
  const auto single = [](DataLoader loader) {
    const auto pass = loader.iterate();
    pass->next();
    const auto sample = pass->next();
    CHECK(torch::equal((*sample)[0], torch::tensor({1.0, 1.0})));
    CHECK((*sample)[1].dim() == 0);
  };
  const auto options = DataLoaderOptions().batch_size(std::nullopt);
  single(DataLoader(Squares(), options));
  single(DataLoader(Squares().map(Stack<>()), options));
}

TEST_CASE("examples without a target are tensors, others what their types say", "[data]") {
  DataLoader tensors(datasets::TensorDataset(torch::arange(6)), DataLoaderOptions(4));
  CHECK(torch::equal(tensors.iterate()->next()->tensor(), torch::arange(4)));
  DataLoader stacked(datasets::TensorDataset(torch::arange(6)).map(Stack<TensorExample>()),
                     DataLoaderOptions(4));
  CHECK(torch::equal(stacked.iterate()->next()->tensor(), torch::arange(4)));

  const auto words = DataLoader(Words(), DataLoaderOptions(3)).iterate()->next();
  CHECK(words->at(0).at(2).as_string() == "word 2");
  CHECK(torch::equal((*words)[1], torch::arange(3)));
}

TEST_CASE("each worker has a copy of the data set, a shared one is shared", "[data]") {
  std::atomic<int> copies{0};
  DataLoader loader(Squares(&copies), DataLoaderOptions(2).num_workers(3));
  const int before = copies;
  const auto pass = loader.iterate();
  CHECK(copies - before == 3);

  DataLoader shared(datasets::SharedBatchDataset<Squares>(std::make_shared<Squares>(&copies)),
                    DataLoaderOptions(2).num_workers(3));
  const int now = copies;
  const auto second = shared.iterate();
  CHECK(copies == now);
}

// ---- Streams ------------------------------------------------------------------------------------

// One after another, from all workers: the parts of a shared stream.
struct Tape : datasets::StreamDataset<Tape, std::vector<TensorExample>> {
  explicit Tape(std::optional<size_t> length) : length(length) {}
  std::vector<TensorExample> get_batch(size_t count) override {
    std::vector<TensorExample> samples;
    for (size_t i = 0; i < count && next < stop; ++i) samples.emplace_back(torch::tensor(next++));
    return samples;
  }
  std::optional<size_t> size() const override { return length; }
  std::optional<size_t> length;
  std::atomic<int64_t> next{0};
  int64_t stop = 1000;
};

std::vector<int64_t> sizes(DataLoader loader) {
  std::vector<int64_t> sizes;
  for (auto pass = loader.iterate(); auto batch = pass->next();) {
    sizes.push_back(batch->tensor().size(0));
  }
  return sizes;
}

TEST_CASE("a stream of known size ends there, whatever the workers", "[data]") {
  const int64_t workers = GENERATE(0, 1, 2, 5);
  const auto tape = std::make_shared<Tape>(11);
  DataLoader loader(tape, DataLoaderOptions(4).num_workers(workers));
  CHECK(loader.size() == 3);
  CHECK(sizes(loader) == std::vector<int64_t>{4, 4, 3});
  CHECK(tape->next == 11);
}

TEST_CASE("a stream of unknown size ends with an empty batch", "[data]") {
  const auto tape = std::make_shared<Tape>(std::nullopt);
  tape->stop = 6;
  DataLoader loader(datasets::SharedBatchDataset<Tape>(tape), DataLoaderOptions(4));
  CHECK_FALSE(loader.size().has_value());
  CHECK(sizes(loader) == std::vector<int64_t>{4, 2});
}

// Says itself when it ends, and begins again at reset().
struct Chunks : datasets::StatefulDataset<Chunks, std::vector<TensorExample>> {
  std::optional<std::vector<TensorExample>> get_batch(size_t count) override {
    std::vector<TensorExample> samples;
    for (; count > 0 && left > 0; --count, --left) samples.emplace_back(torch::tensor(left));
    if (samples.empty()) return std::nullopt;
    return samples;
  }
  std::optional<size_t> size() const override { return std::nullopt; }
  void reset() override { left = 5; }
  void save(torch::serialize::OutputArchive&) const override {}
  void load(torch::serialize::InputArchive&) override {}
  int64_t left = 0;
};

TEST_CASE("a stateful torch data set is reset for each pass and says when it ends", "[data]") {
  DataLoader loader(Chunks().map(Stack<TensorExample>()), DataLoaderOptions(2));
  CHECK(sizes(loader) == std::vector<int64_t>{2, 2, 1});
  CHECK(sizes(loader) == std::vector<int64_t>{2, 2, 1});
  CHECK(sizes(DataLoader(Chunks(), DataLoaderOptions(3).num_workers(1))) ==
        std::vector<int64_t>{3, 2});
}

}  // namespace
}  // namespace lightning
