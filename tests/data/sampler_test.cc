#include "lightning/data/sampler.h"

#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>

#include "lightning/data/dataset.h"
#include "lightning/data/distributed_sampler.h"
#include "lightning/errors.h"
#include "tests/support/python.h"

namespace lightning {
namespace {

using Catch::Matchers::Contains;
using Indices = std::vector<int64_t>;

Indices drain(Sampler& sampler) {
  Indices indices;
  const auto stream = sampler.iterate();
  while (const auto index = stream()) indices.push_back(*index);
  return indices;
}

std::vector<Indices> drain(BatchSamplerBase& sampler) {
  std::vector<Indices> batches;
  Indices batch;
  const auto stream = sampler.iterate();
  while (stream(batch)) batches.push_back(batch);
  return batches;
}

// torch's and Lightning's own samplers, by the name of the case.
constexpr const char* kPython = R"(
import json, torch
from torch.utils.data import *
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSamplerWrapper

out = {}

def seeded(seed):
    return torch.Generator().manual_seed(seed)

torch.manual_seed(11)
out["random"] = [list(RandomSampler(range(20))) for _ in range(3)]
torch.manual_seed(11)
out["random replacement"] = list(RandomSampler(range(20), replacement=True, num_samples=100))
out["random more"] = list(RandomSampler(range(20), num_samples=50))
out["random fewer"] = list(RandomSampler(range(20), num_samples=7))
out["random seed"] = list(RandomSampler(range(20), generator=seeded(5)))
torch.manual_seed(12)
out["subset"] = list(SubsetRandomSampler([3, 1, 4, 15, 9]))
weights = [0.1, 0.9, 0.4, 0.7, 3.0, 0.6]
out["weighted"] = list(WeightedRandomSampler(weights, 20))
out["weighted without"] = list(WeightedRandomSampler(weights, 6, replacement=False))
parts = random_split(range(10), [0.55, 0.3, 0.15], generator=seeded(3))
out["split"] = [list(part.indices) for part in parts]

out["distributed"] = {}
for size in [1, 2, 3, 7, 12, 13]:
    for ranks in [1, 2, 3, 5]:
        for rank in range(ranks):
            for epoch in [0, 3]:
                for drop_last in [False, True]:
                    for shuffle in [False, True]:
                        sampler = DistributedSampler(
                            range(size), ranks, rank, shuffle=shuffle, seed=4, drop_last=drop_last)
                        sampler.set_epoch(epoch)
                        key = f"{size} {ranks} {rank} {epoch} {int(drop_last)} {int(shuffle)}"
                        out["distributed"][key] = [len(sampler), list(sampler)]
                        custom = [10 * i for i in range(size)]
                        wrapper = DistributedSamplerWrapper(
                            custom, ranks, rank, shuffle=shuffle, seed=4, drop_last=drop_last)
                        wrapper.set_epoch(epoch)
                        out["distributed"]["wrapper " + key] = [len(wrapper), list(wrapper)]
                        if size >= ranks and not shuffle and not drop_last:
                            once = UnrepeatedDistributedSamplerWrapper(
                                custom, ranks, rank, shuffle=False)
                            out["distributed"]["once " + key] = [len(once), list(once)]
print(json.dumps(out))
)";

const nlohmann::json& python() {
  static const auto results = nlohmann::json::parse(testing::run_python(kPython));
  return results;
}

class Tens : public Sampler {
 public:
  explicit Tens(int64_t size) : size_(size) {}
  IndexStream iterate() override {
    return [next = int64_t{0}, end = size_]() mutable {
      return next < end ? std::optional<int64_t>(10 * next++) : std::nullopt;
    };
  }
  std::optional<int64_t> size() const override { return size_; }

 private:
  int64_t size_;
};

TEST_CASE("random samplers give the orders of Python's under one seed", "[data]") {
  torch::manual_seed(11);
  RandomSampler random(20);
  for (const auto& expected : python()["random"]) CHECK(drain(random) == expected.get<Indices>());

  torch::manual_seed(11);
  RandomSampler replacement(20, std::nullopt, true, 100);
  CHECK(drain(replacement) == python()["random replacement"].get<Indices>());
  RandomSampler more(20, std::nullopt, false, 50);
  CHECK(drain(more) == python()["random more"].get<Indices>());
  RandomSampler fewer(20, std::nullopt, false, 7);
  CHECK(drain(fewer) == python()["random fewer"].get<Indices>());
  RandomSampler seeded(20, 5);
  CHECK(drain(seeded) == python()["random seed"].get<Indices>());

  torch::manual_seed(12);
  SubsetRandomSampler subset({3, 1, 4, 15, 9});
  CHECK(drain(subset) == python()["subset"].get<Indices>());
  const std::vector<double> weights = {0.1, 0.9, 0.4, 0.7, 3.0, 0.6};
  WeightedRandomSampler weighted(weights, 20);
  CHECK(drain(weighted) == python()["weighted"].get<Indices>());
  WeightedRandomSampler without(weights, 6, false);
  CHECK(drain(without) == python()["weighted without"].get<Indices>());
}

TEST_CASE("random_split gives the parts of Python's under one seed", "[data]") {
  const auto dataset = std::make_shared<TensorDataset>(TensorDataset({torch::arange(10)}));
  const auto parts = random_split(dataset, std::vector<double>{0.55, 0.3, 0.15}, 3);
  for (size_t i = 0; i < parts.size(); ++i) {
    CHECK(parts[i]->indices() == python()["split"][i].get<Indices>());
  }
  CHECK_THROWS_WITH(random_split(dataset, std::vector<int64_t>{5, 6}, 3),
                    Contains("add up to 11") && Contains("10 samples"));
}

TEST_CASE("distributed samplers give each rank the indices of Python's", "[data]") {
  for (const auto& [key, expected] : python()["distributed"].items()) {
    INFO(key);
    std::istringstream in(key.substr(key.find_first_of("0123456789")));
    int64_t size = 0, epoch = 0;
    DistributedSamplerOptions options;
    options.seed = 4;
    in >> size >> options.num_replicas >> options.rank >> epoch >> options.drop_last >>
        options.shuffle;
    std::unique_ptr<Sampler> sampler;
    if (key[0] == 'w' || key[0] == 'o') {
      sampler = std::make_unique<DistributedSamplerWrapper>(std::make_shared<Tens>(size), options,
                                                            /*repeat=*/key[0] == 'w');
    } else {
      sampler = std::make_unique<DistributedSampler>(size, options);
    }
    sampler->set_epoch(epoch);
    CHECK(sampler->size() == expected[0].get<int64_t>());
    CHECK(drain(*sampler) == expected[1].get<Indices>());
  }
}

TEST_CASE("a seeded order depends on seed, epoch and pass, not on what was drawn before",
          "[data]") {
  RandomSampler one(50, 3), other(50, 3);
  torch::manual_seed(GENERATE(0, 1));
  other.set_epoch(2);
  const auto third = drain(other);
  CHECK(drain(one) != third);
  one.set_epoch(2);
  CHECK(drain(one) == third);
  CHECK(drain(one) != third);  // a second pass in the epoch has an order of its own
  one.set_epoch(2);
  CHECK(drain(one) == third);
}

TEST_CASE("the state of a sampler gives the order of its last pass once more", "[data]") {
  const auto make = [](int kind, std::optional<uint64_t> seed) -> std::unique_ptr<Sampler> {
    if (kind == 0) return std::make_unique<RandomSampler>(30, seed);
    if (kind == 1)
      return std::make_unique<SubsetRandomSampler>(Indices{3, 1, 4, 15, 9, 2, 6}, seed);
    return std::make_unique<WeightedRandomSampler>(std::vector<double>{1, 2, 3, 4}, 30, true, seed);
  };
  const int kind = GENERATE(0, 1, 2);
  const auto seed = GENERATE(std::optional<uint64_t>(), std::optional<uint64_t>(8));
  const auto sampler = make(kind, seed);
  drain(*sampler);
  const auto second = drain(*sampler);
  const State state = sampler->state_dict();

  const auto resumed = make(kind, seed);
  resumed->load_state_dict(state);
  CHECK(drain(*resumed) == second);
  if (seed) CHECK(drain(*resumed) == drain(*sampler));  // and the passes after it
}

TEST_CASE("batch samplers group indices and drop an incomplete batch when told", "[data]") {
  BatchSampler keeps(std::make_shared<SequentialSampler>(10), 4);
  CHECK(keeps.size() == 3);
  CHECK(drain(keeps) == std::vector<Indices>{{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9}});
  BatchSampler drops(std::make_shared<SequentialSampler>(10), 4, true);
  CHECK(drops.size() == 2);
  CHECK(drain(drops) == std::vector<Indices>{{0, 1, 2, 3}, {4, 5, 6, 7}});
  CHECK(drain(*drops.keep_last()).size() == 3);
  CHECK(drain(*drops.with_sampler(std::make_shared<SequentialSampler>(4))).size() == 1);
}

TEST_CASE("whole batches are shared out among ranks, padded or each once", "[data]") {
  const auto share = [](int64_t rank, bool repeat) {
    DistributedBatchSampler sampler(
        std::make_shared<BatchSampler>(std::make_shared<SequentialSampler>(9), 2), {3, rank},
        repeat);
    const auto batches = drain(sampler);
    CHECK(sampler.size() == static_cast<int64_t>(batches.size()));
    return batches;
  };
  CHECK(share(0, true) == std::vector<Indices>{{0, 1}, {6, 7}});
  CHECK(share(1, true) == std::vector<Indices>{{2, 3}, {8}});
  CHECK(share(2, true) == std::vector<Indices>{{4, 5}, {0, 1}});  // the first batch again
  CHECK(share(1, false) == std::vector<Indices>{{2, 3}, {8}});
  CHECK(share(2, false) == std::vector<Indices>{{4, 5}});
}

TEST_CASE("samplers refuse what makes no sense", "[data]") {
  CHECK_THROWS_WITH(RandomSampler(0), Contains("size 0"));
  CHECK_THROWS_WITH(RandomSampler(5, std::nullopt, false, 0), Contains("num_samples 0"));
  CHECK_THROWS_WITH(BatchSampler(std::make_shared<SequentialSampler>(3), 0),
                    Contains("batch_size 0"));
  DistributedSamplerOptions options;
  options.num_replicas = 2;
  options.rank = 2;
  CHECK_THROWS_WITH(DistributedSampler(5, options), Contains("rank 2 of 2") && Contains("0 to 1"));
}

}  // namespace
}  // namespace lightning
