#include "lightning/data/combined_loader.h"

#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>

#include "lightning/data/data_loader.h"
#include "lightning/errors.h"
#include "tests/support/python.h"

namespace lightning {
namespace {

using Catch::Matchers::Contains;
using nlohmann::json;

// Every item of Lightning's own CombinedLoader. Its modes but sequential leave the limits to the
// loops, which stop at len(): so does the script.
constexpr const char* kPython = R"(
import itertools, json
from lightning.pytorch.utilities.combined_loader import CombinedLoader

cases = []
for mode in ["min_size", "max_size_cycle", "max_size", "sequential"]:
    for count in [1, 2, 3]:
        for sizes in itertools.product([0, 1, 3, 4], repeat=count):
            for limits in [None, [2] * count, [(i + 2) % 4 for i in range(count)]]:
                loaders = [[100 * i + k for k in range(size)] for i, size in enumerate(sizes)]
                combined = CombinedLoader([range(100 * i, 100 * i + n) for i, n in enumerate(sizes)], mode)
                combined.limits = limits
                iter(combined)
                length = len(combined)
                items = list(combined)
                if mode != "sequential":
                    items = items[:length]
                cases.append({"mode": mode, "sizes": sizes, "limits": limits, "length": length,
                              "items": items})

nested = CombinedLoader({"a": range(2), "b": [range(10, 13), {"c": range(20, 21)}]}, "max_size")
iter(nested)
print(json.dumps({"cases": cases, "nested": list(nested)}))
)";

const json& python() {
  static const json results = json::parse(testing::run_python(kPython));
  return results;
}

// Gives first, first + 1, ...
DataLoader numbers(int64_t first, int64_t size, DataLoaderOptions options = {}) {
  return DataLoader(FunctionDataset(size, [first](int64_t index) { return Batch(first + index); }),
                    options.batch_size(std::nullopt));
}

json to_json(const Batch& batch) {
  if (batch.is_none()) return nullptr;
  if (batch.is_int()) return batch.as_int();
  json out;
  if (batch.is_list()) {
    out = json::array();
    for (const auto& item : batch.as_list()) out.push_back(to_json(item));
  } else {
    for (const auto& [key, item] : batch.as_map()) out[key] = to_json(item);
  }
  return out;
}

json items(CombinedLoader& loader) {
  json out = json::array();
  const auto pass = loader.iterate_items();
  while (const auto item = pass->next()) {
    out.push_back({to_json(item->batch), item->batch_idx, item->dataloader_idx});
    const bool last = loader.size() && static_cast<int64_t>(out.size()) == *loader.size();
    CHECK(pass->done() == last);
  }
  CHECK(pass->done());
  CHECK_FALSE(pass->next().has_value());
  return out;
}

TEST_CASE("the four modes give item for item what Lightning's give, with limits", "[data]") {
  for (const auto& expected : python()["cases"]) {
    INFO(expected.dump());
    std::vector<Loaders> parts;
    for (const auto& size : expected["sizes"]) {
      parts.push_back(numbers(100 * static_cast<int64_t>(parts.size()), size.get<int64_t>()));
    }
    CombinedLoader combined(parts, expected["mode"].get<std::string>());
    if (!expected["limits"].is_null()) {
      combined.set_limits(expected["limits"].get<std::vector<int64_t>>());
    }
    CHECK(combined.size() == expected["length"].get<int64_t>());
    CHECK(items(combined) == expected["items"]);
  }
}

TEST_CASE("items have the structure in which the loaders were given", "[data]") {
  CombinedLoader nested(
      Loaders::map(
          {{"a", numbers(0, 2)},
           {"b", std::vector<Loaders>{numbers(10, 3), Loaders::map({{"c", numbers(20, 1)}})}}}),
      "max_size");
  CHECK(items(nested) == python()["nested"]);
}

// Like a generator in Python: it does not know its length.
class Unsized : public Loader {
 public:
  explicit Unsized(int64_t size) : size_(size) {}
  std::unique_ptr<LoaderIterator> iterate() override {
    ++began;
    return numbers(0, size_).iterate();
  }
  int began = 0;

 private:
  int64_t size_;
};

TEST_CASE("without a length the end is found by fetching one item ahead", "[data]") {
  CombinedLoader combined(std::make_shared<Unsized>(3), "max_size_cycle");
  CHECK_FALSE(combined.size().has_value());
  const auto pass = combined.iterate_items();
  for (int64_t i = 0; i < 3; ++i) {
    const auto item = pass->next();
    CHECK(item->batch.as_int() == i);
    CHECK(pass->done() == (i == 2));
    CHECK(pass->done() == (i == 2));  // asking twice fetches once
  }
  CHECK_FALSE(pass->next().has_value());

  combined.set_limit(2);
  CHECK(combined.size() == 2);
  CHECK(items(combined).size() == 2);
  combined.clear_limits();

  CombinedLoader mixed(std::vector<Loaders>{std::make_shared<Unsized>(9), numbers(0, 2)});
  CHECK(mixed.size() == 2);  // min_size: the endless one cannot be the shortest
}

TEST_CASE("sequential mode begins a loader when it is reached, the others begin all", "[data]") {
  const auto first = std::make_shared<Unsized>(1), second = std::make_shared<Unsized>(1);
  CombinedLoader one_by_one(std::vector<Loaders>{first, second}, "sequential");
  const auto pass = one_by_one.iterate_items();
  pass->next();
  CHECK(first->began == 1);
  CHECK(second->began == 0);
  pass->next();
  CHECK(second->began == 1);
  CombinedLoader together(std::vector<Loaders>{first, second}, "max_size");
  const auto all = together.iterate_items();
  CHECK((first->began == 2 && second->began == 2));
}

TEST_CASE("an error met while fetching ahead waits for its turn", "[data]") {
  FunctionDataset torn(3, [](int64_t index) -> Batch {
    if (index == 1) throw std::runtime_error("torn");
    return Batch(index);
  });
  class Hidden : public Loader {
   public:
    explicit Hidden(DataLoader loader) : loader_(std::move(loader)) {}
    std::unique_ptr<LoaderIterator> iterate() override { return loader_.iterate(); }

   private:
    DataLoader loader_;
  };
  CombinedLoader combined(std::make_shared<Hidden>(DataLoader(torn)), "sequential");
  const auto pass = combined.iterate_items();
  CHECK(pass->next().has_value());
  CHECK_FALSE(pass->done());
  CHECK_THROWS_WITH(pass->next(), Contains("torn"));
  CHECK(pass->next().has_value());
}

TEST_CASE("a combined loader passes on what the loops ask of its loaders", "[data]") {
  CombinedLoader combined(std::vector<Loaders>{numbers(0, 5, DataLoaderOptions().shuffle(true)),
                                               std::make_shared<Unsized>(5)},
                          "sequential");
  combined.set_limit(2);
  CHECK(combined.shuffles());
  const auto ordered = std::dynamic_pointer_cast<CombinedLoader>(combined.sequential());
  CHECK_FALSE(ordered->shuffles());
  CHECK(items(*ordered) == json::parse("[[0,0,0],[1,1,0],[0,0,1],[1,1,1]]"));
  CHECK(combined.distributed({2, 1}, false)->size() == 4);
  CHECK(CombinedLoader(std::make_shared<Unsized>(1)).for_predict() == nullptr);

  CombinedLoader predict(numbers(7, 2), "sequential");
  const auto pass = predict.iterate_items();
  pass->next();
  pass->next();
  CHECK(pass->last_indices() == std::vector<int64_t>{1});
}

TEST_CASE("a combined loader refuses wrong modes and counts", "[data]") {
  const std::vector<Loaders> two = {numbers(0, 2), numbers(0, 3)};
  CHECK_THROWS_WITH(CombinedLoader(two, "max_size_cycel"),
                    Contains("max_size_cycel") &&
                        Contains("min_size, max_size_cycle, max_size, ") &&
                        Contains("Did you mean \"max_size_cycle\""));
  CombinedLoader combined(two);
  CHECK_THROWS_WITH(combined.set_limits({1}), Contains("1 limits for 2 loaders"));
  CHECK_THROWS_WITH(combined.set_limit(-1), Contains("limit -1"));
  CHECK_THROWS_WITH(combined.set_flattened({}), Contains("0 loaders") && Contains("of 2"));
}

}  // namespace
}  // namespace lightning
