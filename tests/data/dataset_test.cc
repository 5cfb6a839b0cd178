#include "lightning/data/dataset.h"

#include <torch/torch.h>

#include <catch2/catch.hpp>

#include "lightning/errors.h"

namespace lightning {
namespace {

using Catch::Matchers::Contains;

TEST_CASE("samples are collated by kind, through lists and maps", "[data]") {
  const auto sample = [](int64_t i) {
    return Batch::map({{"image", torch::full({2, 3}, i)},
                       {"pair", Batch::list({Batch(i), Batch(0.5 * static_cast<double>(i))})},
                       {"flag", Batch(i == 1)},
                       {"name", Batch(str("sample ", i))}});
  };
  const Batch batch = default_collate({sample(0), sample(1), sample(2)});

  CHECK(batch["image"].sizes() == at::IntArrayRef({3, 2, 3}));
  CHECK(torch::equal(batch["image"][2], torch::full({2, 3}, 2)));
  CHECK(torch::equal(batch.at("pair")[0], torch::tensor({0, 1, 2}, torch::kLong)));
  CHECK(torch::equal(batch.at("pair")[1], torch::tensor({0.0, 0.5, 1.0}, torch::kDouble)));
  CHECK(torch::equal(batch["flag"], torch::tensor({false, true, false})));
  CHECK(batch.at("name").at(1).as_string() == "sample 1");
}

TEST_CASE("keys of a sample may come in any order", "[data]") {
  const Batch batch = default_collate({Batch::map({{"a", Batch(1)}, {"b", Batch(2)}}),
                                       Batch::map({{"b", Batch(4)}, {"a", Batch(3)}})});
  CHECK(torch::equal(batch["a"], torch::tensor({1, 3}, torch::kLong)));
  CHECK(torch::equal(batch["b"], torch::tensor({2, 4}, torch::kLong)));
}

TEST_CASE("tensors that cannot be copied byte by byte are stacked all the same", "[data]") {
  const auto whole = torch::arange(12, torch::kFloat).view({3, 4});
  const Batch columns = default_collate({whole.select(1, 0), whole.select(1, 2)});
  CHECK(torch::equal(columns.tensor(), torch::stack({whole.select(1, 0), whole.select(1, 2)})));

  const auto weight = torch::ones({2}, torch::requires_grad());
  const Batch graph = default_collate({weight * 2, weight * 3});
  CHECK(graph.tensor().requires_grad());

  CHECK(default_collate({torch::empty({0, 4}), torch::empty({0, 4})}).tensor().numel() == 0);
}

TEST_CASE("samples that differ are refused with the place where they do", "[data]") {
  const auto with = [](at::Tensor image) {
    return Batch::map({{"inner", Batch::list({Batch(std::move(image))})}});
  };
  CHECK_THROWS_WITH(
      default_collate({with(torch::zeros({2})), with(torch::zeros({2})), with(torch::zeros({3}))}),
      Contains("[\"inner\"][0]") && Contains("[2]") && Contains("number 2") && Contains("[3]") &&
          Contains("collate_fn"));
  CHECK_THROWS_WITH(default_collate({Batch(1), Batch("one")}), Contains("number 1"));
  CHECK_THROWS_WITH(default_collate({Batch(), Batch()}), Contains("returned none"));
  CHECK_THROWS_AS(default_collate({}), MisconfigurationError);
}

TEST_CASE("a TensorDataset gives rows of its tree", "[data]") {
  const auto x = torch::arange(12).view({6, 2});
  const auto y = torch::arange(6);
  TensorDataset named(Batch::map({{"x", x}, {"y", y}}));
  CHECK(named.size() == 6);
  CHECK(torch::equal(named.get(4)["x"], x[4]));
  const auto batch = named.get_batch({5, 0, 5});
  CHECK(torch::equal((*batch)["x"], torch::stack({x[5], x[0], x[5]})));
  CHECK(torch::equal((*batch)["y"], torch::tensor({5, 0, 5})));

  TensorDataset listed({x, y});
  CHECK(torch::equal(listed.get(1)[1], y[1]));
  CHECK_THROWS_WITH(TensorDataset({x, torch::zeros({5})}), Contains("[6, 2]") && Contains("[5]"));
  CHECK_THROWS_AS(TensorDataset(Batch(1)), MisconfigurationError);
}

TEST_CASE("a Subset looks its indices up, also by the batch", "[data]") {
  const auto all = std::make_shared<TensorDataset>(TensorDataset({torch::arange(10)}));
  Subset subset(all, {7, 3, 5});
  CHECK(subset.size() == 3);
  CHECK(subset.get(1)[0].item<int64_t>() == 3);
  CHECK(torch::equal((*subset.get_batch({2, 0}))[0], torch::tensor({5, 7})));
  CHECK_THROWS_WITH(Subset(all, {3, 10}), Contains("index 10") && Contains("0 to 9"));
}

}  // namespace
}  // namespace lightning
