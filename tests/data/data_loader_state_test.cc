// Exact resume: a loader that takes over from a state gives what the first would have given.
#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <functional>

#include "lightning/data/combined_loader.h"
#include "lightning/data/data_loader.h"
#include "lightning/errors.h"

namespace lightning {
namespace {

using Catch::Matchers::Contains;

// Index and a random number, so that both the order and augmentation show.
FunctionDataset noisy(int64_t size) {
  return FunctionDataset(size, [](int64_t index) {
    return Batch(torch::cat({torch::tensor({static_cast<double>(index)}),
                             torch::rand({1}, worker_generator(), torch::kDouble)}));
  });
}

using Batches = std::vector<at::Tensor>;

Batches take(LoaderIterator& pass, int64_t most = 1000) {
  Batches batches;
  while (most-- > 0) {
    auto batch = pass.next();
    if (!batch) break;
    batches.push_back(batch->tensor());
  }
  return batches;
}

bool same(const Batches& a, const Batches& b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(),
                                            [](auto& x, auto& y) { return torch::equal(x, y); });
}

TEST_CASE("a run that resumes in the middle of an epoch gives what an uninterrupted one gives",
          "[data]") {
  const int64_t workers_before = GENERATE(0, 2);
  const int64_t workers_after = GENERATE(0, 3);  // need not be as many
  const auto seed = GENERATE(std::optional<int64_t>(), std::optional<int64_t>(9));
  const int64_t stop = GENERATE(0, 1, 5, 9);
  const auto make = [&](int64_t workers) {
    return DataLoader(noisy(29),
                      DataLoaderOptions(3).shuffle(true).num_workers(workers).seed(seed));
  };

  torch::manual_seed(4);
  DataLoader whole = make(workers_before);
  whole.set_epoch(2);
  const auto pass = whole.iterate();
  take(*pass, stop);
  const State state = whole.state_dict();
  const Batches rest = take(*pass);
  whole.set_epoch(3);
  const Batches after = take(*whole.iterate());

  torch::manual_seed(77);  // another process, another state of the generator
  DataLoader resumed = make(workers_after);
  resumed.load_state_dict(state);
  resumed.set_epoch(2);  // as the loop says again
  if (stop == 0 && workers_before == 0 && !seed) {
    CHECK(take(*resumed.iterate()).size() == rest.size());  // its order was not drawn yet
    return;
  }
  CHECK(same(take(*resumed.iterate()), rest));
  resumed.set_epoch(3);
  const Batches next = take(*resumed.iterate());
  CHECK(next.size() == 10);
  if (seed) CHECK(same(next, after));
}

TEST_CASE("a state may be saved and resumed more than once in an epoch", "[data]") {
  const auto make = [] {
    return DataLoader(noisy(20), DataLoaderOptions(2).shuffle(true).num_workers(2).seed(1));
  };
  DataLoader whole = make();
  const Batches all = take(*whole.iterate());

  Batches pieces;
  State state;
  for (int64_t piece : {3, 4, 10}) {
    DataLoader loader = make();
    loader.load_state_dict(state);
    const auto pass = loader.iterate();
    for (auto& batch : take(*pass, piece)) pieces.push_back(batch);
    state = loader.state_dict();
  }
  CHECK(same(pieces, all));
  CHECK(state.at("finished").as_bool());
}

TEST_CASE("loops without set_epoch resume with the order of the pass that is due", "[data]") {
  const auto make = [] {
    return DataLoader(noisy(12), DataLoaderOptions(4).shuffle(true).seed(1));
  };
  DataLoader whole = make();
  take(*whole.iterate());
  take(*whole.iterate());
  const State ended = whole.state_dict();
  const auto third = whole.iterate();
  take(*third, 1);
  const State middle = whole.state_dict();
  const Batches rest = take(*third);
  const Batches fourth = take(*whole.iterate());

  DataLoader from_end = make();
  from_end.load_state_dict(ended);
  const Batches again = take(*from_end.iterate());
  CHECK(same({again.begin() + 1, again.end()}, rest));
  DataLoader from_middle = make();
  from_middle.load_state_dict(middle);
  CHECK(same(take(*from_middle.iterate()), rest));
  CHECK(same(take(*from_middle.iterate()), fourth));
}

TEST_CASE("a place is forgotten when its pass was complete or another epoch begins", "[data]") {
  const auto make = [] { return DataLoader(noisy(12), DataLoaderOptions(4).seed(1)); };
  DataLoader first = make();
  const auto pass = first.iterate();
  take(*pass, 2);
  const State middle = first.state_dict();
  take(*pass, 1);
  const State end = first.state_dict();  // all are given, though nobody asked for more

  DataLoader next = make();
  next.load_state_dict(end);
  CHECK(take(*next.iterate()).size() == 3);
  next.load_state_dict(middle);
  CHECK(take(*next.iterate()).size() == 1);
  next.load_state_dict(middle);
  next.set_epoch(1);
  CHECK(take(*next.iterate()).size() == 3);
}

TEST_CASE("a state of another number of batches is refused", "[data]") {
  DataLoader first(noisy(12), DataLoaderOptions(4));
  const auto pass = first.iterate();
  take(*pass, 1);
  DataLoader other(noisy(12), DataLoaderOptions(2));
  CHECK_THROWS_WITH(other.load_state_dict(first.state_dict()),
                    Contains("batch 1 of 3") && Contains("has 6 batches"));
}

// ---- Streams ------------------------------------------------------------------------------------

class Counter : public StreamDataset {
 public:
  std::unique_ptr<Stream> open(const WorkerInfo& worker) override {
    return std::make_unique<Part>(worker.id, worker.num_workers);
  }
  bool is_stateful() const override { return true; }

 private:
  class Part : public Stream {
   public:
    Part(int64_t next, int64_t step) : next_(next), step_(step) {}
    std::optional<Batch> next() override {
      if (next_ >= 50) return std::nullopt;
      const auto index = static_cast<double>(std::exchange(next_, next_ + step_));
      return Batch(torch::cat(
          {torch::tensor({index}), torch::rand({1}, worker_generator(), torch::kDouble)}));
    }
    State state_dict() const override { return State::dict({{"next", next_}}); }
    void load_state_dict(const State& state) override {
      if (!state.empty()) next_ = state.at("next").as_int();
    }

   private:
    int64_t next_, step_;
  };
};

TEST_CASE("a stateful stream resumes exactly, whatever its workers had read ahead", "[data]") {
  const int64_t workers = GENERATE(0, 3);
  const int64_t stop = GENERATE(1, 4, 11);
  const auto options = DataLoaderOptions(4).num_workers(workers).seed(3);
  DataLoader whole(Counter(), options);
  const auto pass = whole.iterate();
  take(*pass, stop);
  const State state = whole.state_dict();
  const Batches rest = take(*pass);
  CHECK(rest.size() >= 2);

  DataLoader resumed(Counter(), options);
  resumed.load_state_dict(state);
  CHECK(same(take(*resumed.iterate()), rest));
  DataLoader fewer(Counter(), DataLoaderOptions(4).num_workers(1).seed(3));
  if (workers == 3) CHECK_THROWS_WITH(fewer.load_state_dict(state), Contains("3 parts"));
}

// ---- Several loaders ----------------------------------------------------------------------------

std::vector<Batch> items(CombinedIterator& pass, int64_t most = 1000) {
  std::vector<Batch> batches;
  while (most-- > 0) {
    auto item = pass.next();
    if (!item) break;
    batches.push_back(std::move(item->batch));
  }
  return batches;
}

TEST_CASE("a combined loader resumes in any mode, loaders that had ended staying so", "[data]") {
  const std::string mode = GENERATE("min_size", "max_size_cycle", "max_size");
  const int64_t stop = GENERATE(0, 1, 2, 3, 4, 5, 6);
  const auto make = [&] {
    const auto part = [](int64_t size, int64_t workers) {
      return DataLoader(noisy(size),
                        DataLoaderOptions(2).shuffle(true).num_workers(workers).seed(5));
    };
    return CombinedLoader(std::vector<Loaders>{part(13, 2), part(5, 0), part(8, 1)}, mode);
  };
  CombinedLoader whole = make();
  const auto pass = whole.iterate_items();
  items(*pass, stop);
  const State state = whole.state_dict();
  const auto rest = items(*pass);

  CombinedLoader resumed = make();
  resumed.load_state_dict(state);
  const auto again = resumed.iterate_items(stop);
  int64_t idx = stop;
  for (const auto& expected : rest) {
    const auto item = again->next();
    REQUIRE(item.has_value());
    CHECK(item->batch_idx == idx++);
    for (size_t i = 0; i < 3; ++i) {
      CHECK(item->batch.at(i).is_none() == expected.at(i).is_none());
      if (!expected.at(i).is_none()) CHECK(torch::equal(item->batch[i], expected[i]));
    }
  }
  CHECK_FALSE(again->next().has_value());
}

TEST_CASE("an item that done() fetched ahead does not count in the state", "[data]") {
  const auto make = [] {
    return CombinedLoader(DataLoader(Counter(), DataLoaderOptions(4).seed(3)));
  };
  CombinedLoader whole = make();
  CHECK_FALSE(whole.size().has_value());
  const auto pass = whole.iterate_items();
  pass->next();
  CHECK_FALSE(pass->done());
  const State state = whole.state_dict();
  const auto rest = items(*pass);
  CHECK(pass->done());

  CombinedLoader resumed = make();
  resumed.load_state_dict(state);
  const auto again = items(*resumed.iterate_items(1));
  REQUIRE(again.size() == rest.size());
  CHECK(torch::equal(again[0].tensor(), rest[0].tensor()));

  CombinedLoader two(std::vector<Loaders>{DataLoader(noisy(3)), DataLoader(noisy(3))});
  CHECK_THROWS_WITH(two.load_state_dict(state), Contains("1 loaders") && Contains("2"));
}

}  // namespace
}  // namespace lightning
