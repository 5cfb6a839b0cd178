#include "lightning/data/data_loader.h"

#include <ATen/Parallel.h>
#include <torch/torch.h>

#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <chrono>
#include <filesystem>
#include <functional>
#include <mutex>
#include <nlohmann/json.hpp>
#include <set>
#include <thread>

#include "lightning/data/distributed_sampler.h"
#include "lightning/errors.h"
#include "tests/support/python.h"

namespace lightning {
namespace {

using Catch::Matchers::Contains;
using Indices = std::vector<int64_t>;
using std::chrono::milliseconds;

// The sample at index i is i.
FunctionDataset counting(int64_t size) {
  return FunctionDataset(size, [](int64_t index) { return Batch(index); });
}

Indices values(const Batch& batch) {
  const auto& tensor = batch.tensor();
  return {tensor.const_data_ptr<int64_t>(), tensor.const_data_ptr<int64_t>() + tensor.numel()};
}

std::vector<Indices> drain(LoaderIterator& pass) {
  std::vector<Indices> batches;
  while (const auto batch = pass.next()) batches.push_back(values(*batch));
  return batches;
}
std::vector<Indices> drain(Loader& loader) { return drain(*loader.iterate()); }

Indices flat(const std::vector<Indices>& batches) {
  Indices all;
  for (const auto& batch : batches) all.insert(all.end(), batch.begin(), batch.end());
  return all;
}

Indices range(int64_t size) {
  Indices all(static_cast<size_t>(size));
  for (int64_t i = 0; i < size; ++i) all[static_cast<size_t>(i)] = i;
  return all;
}

size_t threads_of_process() {
  size_t count = 0;
  for ([[maybe_unused]] const auto& entry :
       std::filesystem::directory_iterator("/proc/self/task")) {
    ++count;
  }
  return count;
}

// A thread that was joined may stay in the list for a moment.
bool threads_become(size_t count) {
  for (int i = 0; i < 200 && threads_of_process() != count; ++i) {
    std::this_thread::sleep_for(milliseconds(5));
  }
  return threads_of_process() == count;
}

// ---- Orders -------------------------------------------------------------------------------------

constexpr const char* kPython = R"(
import json, torch
from torch.utils.data import DataLoader

out = {}
for workers in [0, 2]:
    torch.manual_seed(21)
    loader = DataLoader(range(23), batch_size=5, shuffle=True, num_workers=workers)
    out[f"shuffle {workers}"] = [[b.tolist() for b in loader] for _ in range(3)]
    out[f"after {workers}"] = torch.rand(3).tolist()
    drops = DataLoader(range(23), batch_size=5, drop_last=True, num_workers=workers)
    out[f"drop {workers}"] = [[b.tolist() for b in drops]]
    persistent = DataLoader(range(23), batch_size=5, shuffle=True, num_workers=workers,
                            persistent_workers=workers > 0)
    out[f"persistent {workers}"] = [[b.tolist() for b in persistent] for _ in range(3)]
    out[f"after persistent {workers}"] = torch.rand(3).tolist()
print(json.dumps(out))
)";

TEST_CASE("batches and the default generator are those of Python's loader", "[data]") {
  static const auto python = nlohmann::json::parse(testing::run_python(kPython));
  const int64_t workers = GENERATE(0, 2);
  const auto expected = [&](const char* name) { return python[str(name, " ", workers)]; };
  const auto options = DataLoaderOptions(5).num_workers(workers);

  torch::manual_seed(21);
  DataLoader loader(counting(23), DataLoaderOptions(options).shuffle(true));
  for (const auto& pass : expected("shuffle")) {
    CHECK(drain(loader) == pass.get<std::vector<Indices>>());
  }
  const auto drawn = [&](const char* name) {
    const auto numbers = expected(name).get<std::vector<float>>();
    return torch::equal(torch::rand(3), torch::tensor(numbers));
  };
  CHECK(drawn("after"));
  DataLoader drops(counting(23), DataLoaderOptions(options).drop_last(true));
  CHECK(drops.size() == 4);
  CHECK(drain(drops) == expected("drop")[0].get<std::vector<Indices>>());
  DataLoader persistent(counting(23),
                        DataLoaderOptions(options).shuffle(true).persistent_workers(workers > 0));
  for (const auto& pass : expected("persistent")) {
    CHECK(drain(persistent) == pass.get<std::vector<Indices>>());
  }
  CHECK(drawn("after persistent"));
}

TEST_CASE("batches come in order however long each takes", "[data]") {
  FunctionDataset uneven(60, [](int64_t index) {
    std::this_thread::sleep_for(milliseconds(index * 7919 % 5));
    return Batch(index);
  });
  DataLoader loader(uneven, DataLoaderOptions(3).num_workers(4));
  CHECK(loader.size() == 20);
  CHECK(flat(drain(loader)) == range(60));
}

TEST_CASE("a loader may read tensors by the batch, samples as they are, or collate itself",
          "[data]") {
  const int64_t workers = GENERATE(0, 2);
  const auto options = [&] { return DataLoaderOptions(4).num_workers(workers); };
  DataLoader tensors(TensorDataset({torch::arange(10)}), options());
  const auto pass = tensors.iterate();
  CHECK(values(Batch((*pass->next())[0])) == Indices{0, 1, 2, 3});
  CHECK(pass->last_indices() == Indices{0, 1, 2, 3});

  DataLoader single(counting(3), options().batch_size(std::nullopt));
  CHECK(single.size() == 3);
  CHECK(single.iterate()->next()->as_int() == 0);

  DataLoader collated(counting(10), options().collate_fn([](std::vector<Batch> samples) {
    return Batch(static_cast<int64_t>(samples.size()));
  }));
  const auto sizes = collated.iterate();
  CHECK(sizes->next()->as_int() == 4);
  sizes->next();
  CHECK(sizes->next()->as_int() == 2);
  CHECK_FALSE(sizes->next().has_value());
  CHECK_FALSE(sizes->next().has_value());
}

// ---- Threads ------------------------------------------------------------------------------------

struct TornFile : std::runtime_error {
  using std::runtime_error::runtime_error;
};

TEST_CASE("an exception reaches the caller in its batch's place, with its cause and type",
          "[data]") {
  const int64_t workers = GENERATE(0, 1, 3);
  FunctionDataset torn(40, [](int64_t index) -> Batch {
    if (index == 17) throw TornFile("record 17 is torn");
    return Batch(index);
  });
  DataLoader loader(torn, DataLoaderOptions(4).num_workers(workers));
  const auto pass = loader.iterate();
  for (int64_t i = 0; i < 4; ++i) CHECK(values(*pass->next())[0] == 4 * i);
  try {
    pass->next();
    FAIL("the fifth batch came");
  } catch (const DataLoaderError& error) {
    CHECK_THAT(error.what(), Contains("batch 4") && Contains("16, 17, 18, ... 4 in all") &&
                                 Contains("record 17 is torn"));
    CHECK(error.batch_idx() == 4);
    if (workers == 0) {
      CHECK(error.worker_id() == -1);
    } else {
      CHECK((error.worker_id() >= 0 && error.worker_id() < workers));
      CHECK_THAT(error.what(), Contains(str("of ", workers)));
    }
    CHECK_THROWS_AS(std::rethrow_if_nested(error), TornFile);
  }
  CHECK(values(*pass->next())[0] == 20);  // the pass goes on behind it
}

TEST_CASE("torch's errors are told without their C++ stack, others that are no std::exception too",
          "[data]") {
  DataLoader broken(
      FunctionDataset(4, [](int64_t) -> Batch { return torch::zeros({2}) + torch::zeros({3}); }),
      DataLoaderOptions().num_workers(1));
  CHECK_THROWS_WITH(broken.iterate()->next(),
                    Contains("must match the size") && !Contains("frame #"));
  DataLoader odd(FunctionDataset(4, [](int64_t) -> Batch { throw 3; }),
                 DataLoaderOptions().num_workers(1));
  CHECK_THROWS_WITH(odd.iterate()->next(), Contains("no std::exception"));
}

TEST_CASE("an iterator that ends early leaves no thread and does not wait for what is ahead",
          "[data]") {
  DataLoader warm(counting(2), DataLoaderOptions().num_workers(1));  // first use starts others
  drain(warm);
  const size_t before = threads_of_process();
  FunctionDataset slow(10000, [](int64_t index) {
    std::this_thread::sleep_for(milliseconds(10));
    return Batch(index);
  });
  // A batch takes 10 s: a destructor that waited for batches in flight would show.
  DataLoader loader(slow, DataLoaderOptions(1000).num_workers(3));
  const auto begin = std::chrono::steady_clock::now();
  {
    const auto pass = loader.iterate();
    CHECK(threads_become(before + 3));
    std::this_thread::sleep_for(milliseconds(30));
  }
  CHECK(std::chrono::steady_clock::now() - begin < std::chrono::seconds(2));
  CHECK(threads_become(before));
}

TEST_CASE("persistent workers outlive a pass and end with the loader", "[data]") {
  std::mutex mutex;
  std::set<std::thread::id> ids;
  std::atomic<int> starts{0};
  DataLoader warm(counting(2), DataLoaderOptions().num_workers(1));
  drain(warm);
  const size_t before = threads_of_process();
  {
    DataLoader loader(FunctionDataset(20,
                                      [&](int64_t index) {
                                        std::this_thread::sleep_for(milliseconds(1));
                                        const std::lock_guard<std::mutex> lock(mutex);
                                        ids.insert(std::this_thread::get_id());
                                        return Batch(index);
                                      }),
                      DataLoaderOptions().num_workers(2).persistent_workers(true).worker_init_fn(
                          [&](int64_t) { ++starts; }));
    for (int pass = 0; pass < 3; ++pass) CHECK(flat(drain(loader)) == range(20));
    CHECK(threads_become(before + 2));
    CHECK(ids.size() == 2);
    CHECK(starts == 2);
    // A pass beside one that lives has workers of its own.
    const auto one = loader.iterate();
    one->next();
    CHECK(flat(drain(loader)) == range(20));
    CHECK(flat(drain(*one)).size() == 19);
  }
  CHECK(threads_become(before));
}

TEST_CASE("a slow consumer finds at most prefetch_factor batches a worker in flight", "[data]") {
  std::atomic<int64_t> started{0};
  FunctionDataset dataset(200, [&](int64_t index) {
    ++started;
    return Batch(index);
  });
  const int64_t factor = GENERATE(1, 3);
  DataLoader loader(dataset, DataLoaderOptions().num_workers(2).prefetch_factor(factor));
  const auto pass = loader.iterate();
  int64_t most = 0;
  for (int64_t given = 0; given < 20; ++given) {
    std::this_thread::sleep_for(milliseconds(10));
    most = std::max(most, started - given);
    pass->next();
  }
  CHECK(most == 2 * factor);
}

TEST_CASE("all workers load at the same time", "[data]") {
  std::atomic<int> inside{0}, most{0};
  FunctionDataset dataset(12, [&](int64_t index) {
    const int now = ++inside;
    for (int seen = most; seen < now && !most.compare_exchange_weak(seen, now);) {
    }
    std::this_thread::sleep_for(milliseconds(20));
    --inside;
    return Batch(index);
  });
  DataLoader loader(dataset, DataLoaderOptions().num_workers(3));
  drain(loader);
  CHECK(most == 3);
}

TEST_CASE("operators run on one thread in a worker, and as before elsewhere", "[data]") {
  const int before = at::get_num_threads();
  at::set_num_threads(3);
  DataLoader loader(
      FunctionDataset(4,
                      [](int64_t) { return Batch(static_cast<int64_t>(at::get_num_threads())); }),
      DataLoaderOptions(4).num_workers(2));
  CHECK(values(*loader.iterate()->next()) == Indices{1, 1, 1, 1});
  CHECK(at::get_num_threads() == 3);
  std::thread([] { CHECK(at::get_num_threads() == 3); }).join();
  at::set_num_threads(before);
}

TEST_CASE("next() gives up after timeout_s and looks up for whoever handles signals", "[data]") {
  FunctionDataset stuck(4, [](int64_t index) {
    std::this_thread::sleep_for(milliseconds(400));
    return Batch(index);
  });
  DataLoader loader(stuck, DataLoaderOptions().num_workers(1).timeout_s(0.1));
  CHECK_THROWS_WITH(loader.iterate()->next(), Contains("Batch 0") && Contains("timeout_s 0.1"));

  DataLoader patient(stuck, DataLoaderOptions().num_workers(1));
  const auto pass = patient.iterate();
  set_wait_check([] { throw KeyboardInterrupt(); });
  CHECK_THROWS_AS(pass->next(), KeyboardInterrupt);
  CHECK(set_wait_check(nullptr) != nullptr);
  CHECK(values(*pass->next()) == Indices{0});  // nothing was lost
}

TEST_CASE("pinned batches come where there is a GPU, ordinary ones elsewhere", "[data][gpu]") {
  const int64_t workers = GENERATE(0, 2);
  DataLoader loader(TensorDataset({torch::arange(10)}),
                    DataLoaderOptions(4).num_workers(workers).pin_memory(true));
  const auto pass = loader.iterate();
  for (int64_t first = 0; first < 10; first += 4) {
    const auto batch = pass->next();
    CHECK((*batch)[0][0].item<int64_t>() == first);
    CHECK((*batch)[0].is_pinned() == torch::cuda::is_available());
  }
}

// ---- Random numbers in workers ------------------------------------------------------------------

TEST_CASE("random numbers of a data set depend on the seed and the place, not on the workers",
          "[data]") {
  FunctionDataset noise(30, [](int64_t) { return Batch(torch::rand({2}, worker_generator())); });
  const auto all = [&](int64_t workers, int64_t seed) {
    DataLoader loader(noise, DataLoaderOptions(4).num_workers(workers).seed(seed));
    loader.set_epoch(1);
    std::vector<at::Tensor> batches;
    for (auto pass = loader.iterate(); auto batch = pass->next();) {
      batches.push_back(batch->tensor());
    }
    return torch::cat(batches);
  };
  const auto numbers = all(0, 7);
  CHECK(torch::equal(numbers, all(1, 7)));
  CHECK(torch::equal(numbers, all(3, 7)));
  CHECK_FALSE(torch::equal(numbers, all(3, 8)));
  CHECK(std::get<0>(at::_unique(numbers)).numel() == 60);
}

TEST_CASE("a worker knows which one it is, the caller's thread that it is none", "[data]") {
  FunctionDataset who(8, [](int64_t) {
    std::this_thread::sleep_for(milliseconds(5));
    const WorkerInfo* info = worker_info();
    return Batch(info == nullptr ? int64_t{-1} : 10 * info->num_workers + info->id);
  });
  DataLoader alone(who, DataLoaderOptions(8));
  CHECK(values(*alone.iterate()->next())[0] == -1);
  DataLoader two(who, DataLoaderOptions().num_workers(2));
  const auto ids = flat(drain(two));
  CHECK(std::set<int64_t>(ids.begin(), ids.end()) == std::set<int64_t>{20, 21});
  CHECK(worker_info() == nullptr);
}

// ---- What the loops want ------------------------------------------------------------------------

class Buckets : public BatchSamplerBase {  // without drop_last, or a sampler inside
 public:
  BatchIndexStream iterate() override {
    return [pass = passes_++, next = 0](Indices& indices) mutable {
      static const std::vector<Indices> kBatches = {{4, 0}, {1, 5, 3}, {2}};
      if (next == 3) return false;
      indices = kBatches[static_cast<size_t>((next++ + pass) % 3)];
      return true;
    };
  }
  std::optional<int64_t> size() const override { return 3; }

 private:
  int passes_ = 0;
};

TEST_CASE("prediction sees every sample once, with its place, from any loader", "[data]") {
  const int64_t workers = GENERATE(0, 2);
  const auto seen = [&](const Loader& loader) {
    const auto predict = loader.for_predict();
    const auto pass = predict->iterate();
    Indices places;
    while (const auto batch = pass->next()) {
      CHECK(values(*batch) == pass->last_indices());
      for (int64_t place : pass->last_indices()) places.push_back(place);
    }
    std::sort(places.begin(), places.end());
    return places;
  };
  const auto options = [&] { return DataLoaderOptions().num_workers(workers); };
  CHECK(seen(DataLoader(counting(7), options().batch_size(3).drop_last(true))) == range(7));
  CHECK(seen(DataLoader(counting(7), options().batch_size(3).shuffle(true))) == range(7));
  CHECK(seen(DataLoader(counting(6), options().batch_sampler(std::make_shared<Buckets>()))) ==
        range(6));
  const auto drops =
      std::make_shared<BatchSampler>(std::make_shared<SequentialSampler>(7), 3, /*drop_last=*/true);
  CHECK(seen(DataLoader(counting(7), options().batch_sampler(drops))) == range(7));
}

TEST_CASE("ranks predict every sample once between them, also in a random order", "[data]") {
  const auto seen = [](int64_t ranks, const std::function<DataLoader()>& make) {
    Indices all;
    for (int64_t rank = 0; rank < ranks; ++rank) {
      torch::manual_seed(rank);  // ranks need not agree on it
      const DataLoader loader = make();
      const auto share = loader.for_predict()->distributed({ranks, rank}, loader.shuffles());
      const auto mine = flat(drain(*share));
      all.insert(all.end(), mine.begin(), mine.end());
    }
    std::sort(all.begin(), all.end());
    return all;
  };
  CHECK(seen(3, [] { return DataLoader(counting(11), DataLoaderOptions(2)); }) == range(11));
  CHECK(seen(3, [] { return DataLoader(counting(11), DataLoaderOptions(2).shuffle(true)); }) ==
        range(11));
  CHECK(seen(2, [] {
          return DataLoader(counting(6),
                            DataLoaderOptions().batch_sampler(std::make_shared<Buckets>()));
        }) == range(6));
}

TEST_CASE("a rank's share is that of DistributedSampler, once", "[data]") {
  DataLoader loader(counting(10), DataLoaderOptions(2));
  CHECK(flat(drain(*loader.distributed({3, 1}, false))) == Indices{1, 4, 7, 0});
  const auto shuffled = loader.distributed({3, 1}, true);
  CHECK(shuffled->shuffles());
  CHECK(shuffled->size() == 2);
  CHECK(shuffled->distributed({3, 1}, true) == nullptr);
  DistributedSampler expected(10, {3, 1, true, 0, false});
  for (int64_t epoch : {0, 5}) {
    shuffled->set_epoch(epoch);
    expected.set_epoch(epoch);
    Indices indices;
    const auto stream = expected.iterate();
    while (const auto index = stream()) indices.push_back(*index);
    CHECK(flat(drain(*shuffled)) == indices);
  }
  // overfit_batches over ranks: in order, shared out.
  const auto overfit = DataLoader(counting(10), DataLoaderOptions(2).shuffle(true)).sequential();
  CHECK(flat(drain(*overfit->distributed({2, 1}, false))) == Indices{1, 3, 5, 7, 9});
}

TEST_CASE("overfitting reads in order, or repeats a custom batch sampler's first pass", "[data]") {
  DataLoader shuffled(counting(6), DataLoaderOptions(2).shuffle(true));
  CHECK(shuffled.shuffles());
  CHECK_FALSE(shuffled.sequential()->shuffles());
  CHECK(flat(drain(*shuffled.sequential())) == range(6));

  DataLoader custom(counting(6), DataLoaderOptions().batch_sampler(std::make_shared<Buckets>()));
  CHECK(drain(custom) != drain(custom));
  const auto repeated = custom.sequential();
  const auto first = drain(*repeated);
  CHECK(first.size() == 3);
  CHECK(drain(*repeated) == first);
}

// ---- Streams ------------------------------------------------------------------------------------

class Numbers : public StreamDataset {  // 0, 1, 2, ... dealt out to the workers in turn
 public:
  explicit Numbers(int64_t end, int64_t throws_at = -1) : end_(end), throws_at_(throws_at) {}
  std::unique_ptr<Stream> open(const WorkerInfo& worker) override {
    return std::make_unique<Part>(*this, worker.id, worker.num_workers);
  }

 private:
  class Part : public Stream {
   public:
    Part(const Numbers& all, int64_t next, int64_t step) : all_(all), next_(next), step_(step) {}
    std::optional<Batch> next() override {
      if (next_ == all_.throws_at_) throw TornFile("the stream is torn");
      if (next_ >= all_.end_) return std::nullopt;
      return Batch(std::exchange(next_, next_ + step_));
    }

   private:
    const Numbers& all_;
    int64_t next_, step_;
  };
  int64_t end_, throws_at_;
};

TEST_CASE("a stream's batches come from its workers in turn until each has ended", "[data]") {
  DataLoader alone(Numbers(7), DataLoaderOptions(3));
  CHECK_FALSE(alone.size().has_value());
  CHECK(drain(alone) == std::vector<Indices>{{0, 1, 2}, {3, 4, 5}, {6}});
  CHECK(drain(alone).size() == 3);
  DataLoader two(Numbers(11), DataLoaderOptions(3).num_workers(2));
  CHECK(drain(two) == std::vector<Indices>{{0, 2, 4}, {1, 3, 5}, {6, 8, 10}, {7, 9}});
  DataLoader drops(Numbers(11), DataLoaderOptions(3).num_workers(2).drop_last(true));
  CHECK(drain(drops).size() == 3);
  DataLoader more(Numbers(2), DataLoaderOptions(3).num_workers(4));  // two find nothing to do
  CHECK(drain(more) == std::vector<Indices>{{0}, {1}});
}

TEST_CASE("an endless stream stops with its iterator, and an error in it is told", "[data]") {
  DataLoader endless(Numbers(int64_t{1} << 60), DataLoaderOptions(3).num_workers(2));
  CHECK(values(*endless.iterate()->next()) == Indices{0, 2, 4});

  const int64_t workers = GENERATE(0, 2);
  DataLoader torn(Numbers(100, 8), DataLoaderOptions(2).num_workers(workers));
  const auto pass = torn.iterate();
  CHECK_THROWS_AS(drain(*pass), DataLoaderError);
  CHECK(DataLoader(Numbers(9), DataLoaderOptions(2)).distributed({2, 0}, true) == nullptr);
}

// ---- Options ------------------------------------------------------------------------------------

TEST_CASE("options that make no sense are refused with what would do", "[data]") {
  const auto refused = [](DataLoaderOptions options) {
    try {
      DataLoader loader(counting(4), std::move(options));
    } catch (const MisconfigurationError& error) {
      return std::string(error.what());
    }
    return std::string("was taken");
  };
  CHECK_THAT(refused(DataLoaderOptions(0)), Contains("batch_size 0") && Contains("at least 1"));
  CHECK_THAT(refused(DataLoaderOptions().num_workers(-1)), Contains("num_workers -1"));
  CHECK_THAT(refused(DataLoaderOptions().timeout_s(-1.0)), Contains("timeout_s -1"));
  CHECK_THAT(refused(DataLoaderOptions().prefetch_factor(2)),
             Contains("prefetch_factor without workers"));
  CHECK_THAT(refused(DataLoaderOptions().persistent_workers(true)), Contains("num_workers to 1"));
  CHECK_THAT(refused(DataLoaderOptions().num_workers(1).prefetch_factor(0)),
             Contains("prefetch_factor 0"));
  CHECK_THAT(refused(DataLoaderOptions(2).batch_sampler(std::make_shared<Buckets>())),
             Contains("batch_sampler and batch_size"));
  CHECK_THAT(
      refused(DataLoaderOptions().shuffle(true).sampler(std::make_shared<SequentialSampler>(4))),
      Contains("shuffle and a sampler"));
  CHECK_THAT(refused(DataLoaderOptions().batch_size(std::nullopt).drop_last(true)),
             Contains("drop_last without a batch_size"));
  CHECK_THROWS_WITH(DataLoader(Numbers(3), DataLoaderOptions().shuffle(true)),
                    Contains("shuffle for a StreamDataset"));
  CHECK_THROWS_AS(DataLoader(std::shared_ptr<Dataset>()), MisconfigurationError);
}

TEST_CASE("an index outside the data set is refused in its turn", "[data]") {
  const int64_t workers = GENERATE(0, 2);
  DataLoader loader(counting(3), DataLoaderOptions(2).num_workers(workers).sampler(
                                     std::make_shared<SequentialSampler>(5)));
  const auto pass = loader.iterate();
  CHECK(values(*pass->next()) == Indices{0, 1});
  CHECK_THROWS_WITH(pass->next(), Contains("index 3") && Contains("0 to 2"));
}

}  // namespace
}  // namespace lightning
