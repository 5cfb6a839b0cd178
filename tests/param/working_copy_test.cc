#include "lightning/param/working_copy.h"

#include <torch/torch.h>

#include <catch2/catch.hpp>

using Catch::Matchers::Contains;
using namespace lightning;

namespace {

at::Tensor parameter(double value = 1.5) { return torch::full({3, 2}, value).requires_grad_(); }

// What a step of an optimizer does.
void step(WorkingCopies& copies, const at::Tensor& weight, double change) {
  const at::NoGradGuard no_grad;
  const auto place = copies.place_for(weight);
  weight.add_(change);
  if (!place.defined()) return;
  place.data().copy_(weight);
  copies.set_current(weight);
}

}  // namespace

TEST_CASE("a weight is cast once, and then only by the optimizer's step", "[param]") {
  WorkingCopies copies(at::kBFloat16);
  const auto weight = parameter();
  const auto scope = WorkingCopies::use(&copies);
  const auto first = working_copy(weight, at::kBFloat16);
  CHECK(first.scalar_type() == at::kBFloat16);
  CHECK_FALSE(first.requires_grad());
  CHECK(torch::equal(first, weight.detach().to(at::kBFloat16)));
  CHECK(working_copy(weight, at::kBFloat16).is_same(first));

  step(copies, weight, 1);
  CHECK(working_copy(weight, at::kBFloat16).is_same(first));  // where a captured graph reads it
  CHECK(torch::equal(first, torch::full({3, 2}, 2.5, at::kBFloat16)));
}

TEST_CASE("parameters that no layer reads in 16 bits have no copy", "[param]") {
  WorkingCopies copies(at::kBFloat16);
  const auto weight = parameter(), unread = parameter();
  {
    const auto scope = WorkingCopies::use(&copies);
    working_copy(weight, at::kBFloat16);
    working_copy(weight, at::kHalf);  // another dtype: a cast
    CHECK(working_copy(weight, at::kFloat).data_ptr() == weight.data_ptr());
    working_copy(weight.t(), at::kBFloat16);            // no leaf
    working_copy(parameter().detach(), at::kBFloat16);  // takes no gradient
    working_copy(torch::ones(2, at::kDouble).requires_grad_(), at::kBFloat16);
  }
  CHECK(copies.size() == 1);
  CHECK_FALSE(copies.place_for(unread).defined());
  CHECK(copies.place_for(weight).defined());
  working_copy(unread, at::kBFloat16);  // nobody keeps copies now
  CHECK(copies.size() == 1);
  copies.clear();
  CHECK_FALSE(copies.place_for(weight).defined());
}

TEST_CASE("a weight that somebody else wrote is cast anew, in the same place", "[param]") {
  WorkingCopies copies(at::kBFloat16);
  const auto weight = parameter();
  const auto scope = WorkingCopies::use(&copies);
  const auto copy = working_copy(weight, at::kBFloat16);
  const auto expect = [&](double value) {
    CHECK_FALSE(copies.current(weight).defined());
    CHECK(working_copy(weight, at::kBFloat16).is_same(copy));
    CHECK(torch::equal(copy, torch::full({3, 2}, value, at::kBFloat16)));
  };
  {
    const at::NoGradGuard no_grad;
    weight.fill_(4);
  }
  expect(4);
  auto handle = weight;
  handle.set_data(torch::full({3, 2}, 5.0));
  expect(5);
  weight.detach().mul_(2);
  copies.refresh({weight, parameter()});  // as before a captured step is replayed
  CHECK(copies.size() == 1);
  CHECK(torch::equal(copies.current(weight), torch::full({3, 2}, 10.0, at::kBFloat16)));
}

TEST_CASE("a weight of another shape or layout gets another place", "[param]") {
  WorkingCopies copies(at::kBFloat16);
  const auto weight = parameter();
  const auto before = copies.want(weight);
  auto handle = weight;
  handle.set_data(torch::ones({2, 3}).t());
  const auto after = copies.want(weight);
  CHECK_FALSE(after.is_same(before));
  CHECK(after.strides() == weight.strides());
}

TEST_CASE("copies that were made while evaluating serve training", "[param]") {
  WorkingCopies copies(at::kBFloat16);
  const auto weight = parameter();
  const auto scope = WorkingCopies::use(&copies);
  {
    const c10::InferenceMode inference;
    working_copy(weight, at::kBFloat16);
  }
  const auto copy = working_copy(weight, at::kBFloat16);
  CHECK_FALSE(copy.is_inference());
  const auto x = torch::ones({2, 3}, at::kBFloat16).requires_grad_();
  torch::mm(x, copy).sum().backward();
  CHECK(x.grad().defined());
}

TEST_CASE("a frozen weight keeps reading the copy it has", "[param]") {
  WorkingCopies copies(at::kBFloat16);
  const auto weight = parameter();
  const auto copy = copies.want(weight);
  weight.requires_grad_(false);
  CHECK(copies.want(weight).is_same(copy));
}

TEST_CASE("backward through a graph from before the step is an error, not other gradients",
          "[param]") {
  WorkingCopies copies(at::kBFloat16);
  const auto weight = parameter();
  const auto x = torch::ones({2, 3}, at::kBFloat16).requires_grad_();
  const auto loss = torch::mm(x, copies.want(weight)).sum();
  step(copies, weight, 1);
  CHECK_THROWS_WITH(loss.backward(), Contains("modified by an inplace operation"));
}

TEST_CASE("copies are the thread's own, and nest", "[param]") {
  WorkingCopies outer(at::kBFloat16), inner(at::kBFloat16);
  const auto weight = parameter();
  const auto one = WorkingCopies::use(&outer);
  {
    const auto two = WorkingCopies::use(&inner);
    const auto none = WorkingCopies::use(nullptr);
    working_copy(weight, at::kBFloat16);
  }
  CHECK(inner.size() + outer.size() == 0);
  working_copy(weight, at::kBFloat16);
  CHECK(outer.size() == 1);
}
