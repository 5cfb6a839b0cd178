#include "lightning/nn/cross_entropy.h"

#include <torch/torch.h>
#include <unistd.h>

#include <array>
#include <catch2/catch.hpp>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "tests/support/python.h"

using namespace lightning;
using Catch::Matchers::Contains;
using torch::nn::CrossEntropyLossOptions;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Result {
  at::Tensor loss, gradient;
};

// The loss, and the gradient of its sum with weights that differ from element to element.
template <class Loss>
Result run(const at::Tensor& logits, const Loss& loss_of) {
  const auto leaf = logits.detach().requires_grad_();
  const auto loss = loss_of(leaf);
  const auto upstream = torch::linspace(0.5, 2.0, loss.numel(), loss.options()).view(loss.sizes());
  loss.backward(upstream);
  return {loss.detach(), leaf.grad()};
}

Result fused(const at::Tensor& logits, const at::Tensor& target,
             const CrossEntropyLossOptions& options) {
  return run(logits,
             [&](const auto& leaf) { return nn::fused_cross_entropy(leaf, target, options); });
}

Result by_aten(const at::Tensor& logits, const at::Tensor& target,
               const CrossEntropyLossOptions& options) {
  return run(logits, [&](const auto& leaf) {
    const auto& weight = options.weight();
    return at::cross_entropy_loss(leaf, target,
                                  weight.defined() ? std::make_optional(weight) : std::nullopt,
                                  static_cast<int64_t>(nn::reduction_of(options)),
                                  options.ignore_index(), options.label_smoothing());
  });
}

// The largest difference, where NaN equals NaN and an infinity itself.
double difference(const at::Tensor& left, const at::Tensor& right) {
  if (left.sizes() != right.sizes()) return kInfinity;
  const auto a = left.to(at::kDouble), b = right.to(a.device(), at::kDouble);
  const auto same = (a == b) | (a.isnan() & b.isnan());
  const auto far = (a - b).abs().masked_fill(same, 0).nan_to_num(kInfinity, kInfinity);
  return far.numel() == 0 ? 0 : far.max().item<double>();
}

double largest(const at::Tensor& tensor) { return tensor.abs().nan_to_num(0).max().item<double>(); }

std::vector<CrossEntropyLossOptions> all_options(int64_t a_class) {
  std::vector<CrossEntropyLossOptions> all;
  for (const CrossEntropyLossOptions::reduction_t& reduction :
       std::vector<CrossEntropyLossOptions::reduction_t>{torch::kNone, torch::kMean, torch::kSum}) {
    for (const double smoothing : {0.0, 0.1, 1.0}) {
      for (const int64_t ignore : {int64_t{-100}, a_class}) {
        all.push_back(
            CrossEntropyLossOptions().reduction(reduction).label_smoothing(smoothing).ignore_index(
                ignore));
      }
    }
  }
  return all;
}

std::string words(const CrossEntropyLossOptions& options) {
  static const std::array<const char*, 3> names{"none", "mean", "sum"};
  std::ostringstream out;
  out << names[static_cast<size_t>(nn::reduction_of(options))] << ", smoothing "
      << options.label_smoothing() << ", ignore_index " << options.ignore_index();
  return out.str();
}

at::Tensor classes(at::IntArrayRef sizes, int64_t count, const at::Device& device = at::kCPU) {
  return torch::randint(count, sizes, torch::TensorOptions(at::kLong).device(device));
}

double gpu_ms(const std::function<void()>& work) {
  torch::cuda::synchronize();
  const auto start = std::chrono::steady_clock::now();
  work();
  torch::cuda::synchronize();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

}  // namespace

TEST_CASE("the fused cross-entropy is ATen's in float64, with every option and shape", "[nn]") {
  torch::manual_seed(1);
  struct Case {
    at::Tensor logits, target;
  };
  const auto randn = [](at::IntArrayRef sizes) { return 3 * torch::randn(sizes, at::kDouble); };
  const std::vector<Case> cases{
      {randn({5, 7}), classes({5}, 7)},
      {randn({4, 1}), classes({4}, 1)},
      {randn({6}), classes({}, 6)},
      {randn({3, 7, 2}), classes({3, 2}, 7)},
      {randn({2, 5, 3, 2}), classes({2, 3, 2}, 5)},
      {randn({2, 4, 9}).transpose(1, 2), classes({2, 4}, 9)},
      {randn({7, 5}).t(), classes({5}, 7)},
      {randn({5, 9}).narrow(1, 1, 7), classes({5}, 7)},
      {randn({1, 7}).expand({5, 7}), classes({10}, 7).slice(0, 0, 10, 2)},
      {randn({0, 5}), classes({0}, 5)},
      {randn({2, 5, 0}), classes({2, 0}, 5)},
  };
  for (const auto& [logits, target] : cases) {
    const int64_t a_class = target.numel() > 0 ? target.flatten()[0].item<int64_t>() : 1;
    for (const auto& options : all_options(a_class)) {
      INFO("logits " << logits.sizes() << ", " << words(options));
      const auto ours = fused(logits, target, options);
      const auto theirs = by_aten(logits, target, options);
      CHECK(ours.loss.scalar_type() == at::kDouble);
      CHECK(difference(ours.loss, theirs.loss) < 1e-13);
      CHECK(difference(ours.gradient, theirs.gradient) < 1e-14);
    }
  }
}

TEST_CASE("class weights and probabilities as the target are ATen's", "[nn]") {
  torch::manual_seed(2);
  const auto logits = torch::randn({5, 7, 2}, at::kDouble);
  const auto target = classes({5, 2}, 7);
  const auto probabilities = torch::softmax(torch::randn({5, 7, 2}, at::kDouble), 1);
  const auto weight = torch::rand({7}, at::kDouble);
  for (auto options : all_options(target[0][0].item<int64_t>())) {
    INFO(words(options));
    const auto check = [&](const at::Tensor& to) {
      const auto ours = fused(logits, to, options), theirs = by_aten(logits, to, options);
      CHECK(difference(ours.loss, theirs.loss) == 0);
      CHECK(difference(ours.gradient, theirs.gradient) == 0);
    };
    if (options.ignore_index() < 0) check(probabilities);
    options.weight(weight);
    check(target);
    if (options.ignore_index() < 0) check(probabilities);
  }
  const auto half = nn::fused_cross_entropy(logits.to(at::kBFloat16), target,
                                            CrossEntropyLossOptions().weight(weight));
  CHECK(half.scalar_type() == at::kFloat);
}

TEST_CASE("infinite logits, masked classes and rows without a loss are as ATen's", "[nn]") {
  auto logits = torch::randn({6, 5}, at::kDouble);
  logits[0][1] = -kInfinity;    // masked
  logits[1][2] = -kInfinity;    // the target's own
  logits[2].fill_(-kInfinity);  // all
  logits[3][0] = kInfinity;     // no softmax
  logits[4][3] = std::nan("");
  logits[5] = logits[5] * 1e6;
  const auto target = torch::tensor({0, 2, 0, 0, 1, 4}, at::kLong);
  for (const auto& options : {CrossEntropyLossOptions().reduction(torch::kNone),
                              CrossEntropyLossOptions().reduction(torch::kSum)}) {
    const auto ours = fused(logits, target, options), theirs = by_aten(logits, target, options);
    INFO(ours.loss << theirs.loss << ours.gradient << theirs.gradient);
    CHECK(difference(ours.loss, theirs.loss) < 1e-9);
    CHECK(difference(ours.gradient, theirs.gradient) < 1e-12);
  }
}

TEST_CASE("the mean where every target is ignored is NaN, with a gradient of zeros", "[nn]") {
  const auto target = torch::full({3}, -100, at::kLong);
  const auto [loss, gradient] = fused(torch::randn({3, 4}), target, {});
  CHECK(std::isnan(loss.item<double>()));
  CHECK(difference(gradient, torch::zeros({3, 4})) == 0);
}

TEST_CASE("16-bit logits have a float32 loss, as near the truth as Python's under autocast",
          "[nn]") {
  constexpr const char* kScript = R"(
import json, torch
torch.set_num_threads(1)
torch.manual_seed(7)
x = (4 * torch.randn(257, 129)).bfloat16()
y = torch.randint(129, (257,))
leaf = x.clone().requires_grad_()
with torch.autocast("cpu", torch.bfloat16):
    loss = torch.nn.functional.cross_entropy(leaf, y)
loss.backward()
print(json.dumps({"loss": loss.item(), "dtype": str(loss.dtype), "first": x[0].double().tolist(),
                  "gradient": leaf.grad.double().flatten().tolist()}))
)";
  const auto python = nlohmann::json::parse(testing::run_python(kScript));
  torch::manual_seed(7);
  const auto logits = (4 * torch::randn({257, 129})).to(at::kBFloat16);
  const auto target = classes({257}, 129);
  REQUIRE(python["first"].get<std::vector<double>>()[5] == logits[0][5].item<double>());

  const auto truth = by_aten(logits.to(at::kDouble), target, {});
  const auto loss = nn::fused_cross_entropy(logits, target);
  CHECK(loss.scalar_type() == at::kFloat);
  const double ours = difference(loss, truth.loss);
  const double theirs = std::abs(python["loss"].get<double>() - truth.loss.item<double>());
  INFO("off by " << ours << "; Python, in " << python["dtype"] << ", by " << theirs);
  CHECK(ours < 5e-6);
  CHECK(ours <= theirs + 1e-6);
  // What the operator makes of the same logits where nobody casts them, as on a GPU.
  CHECK(ours * 100 < difference(at::cross_entropy_loss(logits, target), truth.loss));

  const auto leaf = logits.detach().clone().requires_grad_();
  nn::fused_cross_entropy(leaf, target).backward();
  CHECK(leaf.grad().scalar_type() == at::kBFloat16);
  const auto of_python = torch::tensor(python["gradient"].get<std::vector<double>>(), at::kDouble);
  const auto expected = truth.gradient.flatten() / 0.5;  // run() starts from 0.5
  const auto norm = [&](const at::Tensor& gradient) {
    return (gradient.to(at::kDouble).flatten() - expected).norm().item<double>();
  };
  INFO("gradients off by " << norm(leaf.grad()) << " and " << norm(of_python));
  CHECK(norm(leaf.grad()) <= 1.001 * norm(of_python));
}

TEST_CASE("a gradient scaler's factor reaches float16 gradients before they are rounded", "[nn]") {
  torch::manual_seed(3);
  const auto logits = torch::randn({4096, 8});
  const auto target = classes({4096}, 8);
  const auto leaf = logits.to(at::kHalf).requires_grad_();
  (nn::fused_cross_entropy(leaf, target) * 65536).backward();
  const auto truth = by_aten(leaf.detach().to(at::kDouble), target, {}).gradient / 0.5 * 65536;
  CHECK(difference(leaf.grad(), truth) < 1e-2);  // elements reach 16
  CHECK((leaf.grad() == 0).sum().item<int64_t>() == 0);
}

TEST_CASE("targets of any integer dtype are classes", "[nn]") {
  const auto logits = torch::randn({5, 7});
  const auto target = classes({5}, 7);
  const auto expected = nn::fused_cross_entropy(logits, target).item<double>();
  for (const auto dtype : {at::kInt, at::kShort, at::kByte}) {
    CHECK(nn::fused_cross_entropy(logits, target.to(dtype)).item<double>() == expected);
  }
}

TEST_CASE("logits that somebody can see never change; others become their gradient", "[nn]") {
  const auto input = torch::randn({5, 7});
  const auto target = classes({5}, 7);
  const auto expected = by_aten(input, target, {}).gradient / 0.5;
  // Where the gradient lies of logits that `hold` may keep.
  const auto place = [&](const std::function<at::Tensor(const at::Tensor&)>& hold, bool retain) {
    const auto leaf = input.clone().requires_grad_();
    at::Tensor held, loss, gradient;
    const void* logits_at = nullptr;
    {
      const auto logits = leaf * 1;
      logits_at = logits.const_data_ptr();
      logits.register_hook([&gradient](const at::Tensor& g) { gradient = g; });
      held = hold(logits);
      loss = nn::fused_cross_entropy(logits.view({-1, 7}), target);
    }
    loss.backward({}, retain);
    CHECK(difference(leaf.grad(), expected) < 1e-7);
    if (held.defined()) CHECK(difference(held, input) == 0);
    if (retain) {
      loss.backward();
      CHECK(difference(leaf.grad(), 2 * expected) < 1e-7);
    }
    return gradient.const_data_ptr() == logits_at;
  };
  const auto nobody = [](const at::Tensor&) { return at::Tensor(); };
  CHECK(place(nobody, false));
  CHECK_FALSE(place([](const at::Tensor& logits) { return logits; }, false));
  CHECK_FALSE(place([](const at::Tensor& logits) { return logits.detach(); }, false));
  CHECK_FALSE(place(
      [](const at::Tensor& logits) {
        return logits.view({7, 5}).view({5, 7});
      },
      false));
  place(nobody, true);
}

TEST_CASE("logits that another part of the graph saved are left to it", "[nn]") {
  const auto input = torch::randn({5, 7}, at::kDouble);
  const auto target = classes({5}, 7);
  const auto run_with = [&](bool ours) {
    const auto leaf = input.clone().requires_grad_();
    at::Tensor loss;
    {
      const auto logits = (leaf * 1).exp();  // saves its result
      loss =
          ours ? nn::fused_cross_entropy(logits, target) : at::cross_entropy_loss(logits, target);
      loss = loss + logits.square().logsumexp({1}).mean();
    }
    loss.backward();
    return leaf.grad();
  };
  CHECK(difference(run_with(true), run_with(false)) < 1e-12);
}

TEST_CASE("without a gradient there is the loss alone", "[nn]") {
  const auto logits = torch::randn({5, 7}).requires_grad_();
  const auto target = classes({5}, 7);
  const auto expected = nn::fused_cross_entropy(logits, target).item<double>();
  {
    const torch::NoGradGuard no_grad;
    CHECK_FALSE(nn::fused_cross_entropy(logits, target).requires_grad());
  }
  const c10::InferenceMode inference;
  CHECK(nn::fused_cross_entropy(logits, target).item<double>() == expected);
}

TEST_CASE("what a fused cross-entropy cannot do is refused in words", "[nn]") {
  const auto logits = torch::randn({5, 7}).requires_grad_();
  const auto target = classes({5}, 7);
  CHECK_THROWS_WITH(nn::fused_cross_entropy(logits, classes({4}, 7)),
                    Contains("[5, 7]") && Contains("[4]") && Contains("expected a target of [5]"));
  CHECK_THROWS_WITH(nn::fused_cross_entropy(logits.to(at::kLong), target),
                    Contains("expected a floating dtype"));
  CHECK_THROWS_WITH(nn::fused_cross_entropy(logits, target == 1), Contains("expected integers"));
  CHECK_THROWS_WITH(
      nn::fused_cross_entropy(logits, target, CrossEntropyLossOptions().label_smoothing(1.5)),
      Contains("label_smoothing 1.5"));
  CHECK_THROWS_WITH(nn::fused_cross_entropy(logits, torch::full({5}, 7, at::kLong)),
                    Contains("a target of 7 for 7 classes") && Contains("0 to 6"));
  CHECK_THROWS_WITH(nn::fused_cross_entropy(logits, torch::full({5}, -1, at::kLong)),
                    Contains("a target of -1"));
  CHECK_THROWS_WITH(nn::fused_cross_entropy(torch::randn({2, 0}), classes({2}, 1)),
                    Contains("at least one class"));
  const auto loss = nn::fused_cross_entropy(logits, target);
  CHECK_THROWS_WITH(
      torch::autograd::grad({loss}, {logits}, {}, true, true),
      Contains("fused_cross_entropy") && Contains("torch::nn::functional::cross_entropy"));
}

TEST_CASE("the kernels give ATen's losses and gradients for any width and alignment", "[nn][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  // A sanitizer takes its time: each path of the kernels once.
  const bool watched = std::getenv("LIGHTNING_SANITIZER") != nullptr;
  const auto widths =
      watched ? std::vector<int64_t>{1, 7, 33, 1001, 50257}
              : std::vector<int64_t>{1, 7, 8, 33, 256, 1000, 1001, 50257, 50304, 131075};
  torch::manual_seed(4);
  for (const auto dtype : {at::kFloat, at::kHalf, at::kBFloat16}) {
    // One unit in the last place of elements up to 1.
    const double unit = dtype == at::kFloat ? 2e-6 : dtype == at::kHalf ? 5e-4 : 4e-3;
    for (const int64_t width : widths) {
      for (const int64_t shift : {0, 1}) {  // in elements, of the rows' start
        const auto wide = 3 * torch::randn({6, width + 2 * shift}, at::kCUDA);
        const auto logits = wide.to(dtype).narrow(1, shift, width);
        const auto target = classes({6}, width, at::kCUDA);
        const int64_t ignored = target[2].item<int64_t>();
        for (const auto& options : all_options(ignored)) {
          if (watched && nn::reduction_of(options) != nn::Reduction::kMean) continue;
          INFO(dtype << ", width " << width << ", shift " << shift << ", " << words(options));
          const auto truth = by_aten(logits.to(at::kDouble), target, options);
          const auto ours = fused(logits, target, options);
          CHECK(ours.loss.scalar_type() == at::kFloat);
          CHECK(difference(ours.loss, truth.loss) < 2e-5 * (1 + largest(truth.loss)));
          CHECK(difference(ours.gradient, truth.gradient) < 2 * unit);

          const nn::RowTargets targets{target, options.ignore_index(), options.label_smoothing()};
          const auto over = logits.clone(at::MemoryFormat::Contiguous);
          const auto losses = nn::cross_entropy_rows_in_place(over, targets);
          const auto sum = CrossEntropyLossOptions(options).reduction(torch::kSum);
          const auto whole = by_aten(logits.to(at::kDouble), target, sum);
          CHECK(difference(losses.sum(), whole.loss) < 2e-5 * (1 + largest(whole.loss)));
          CHECK(difference(over, whole.gradient / 0.5) < unit);
        }
      }
    }
  }
}

TEST_CASE("the kernels treat infinite logits and rows without targets as ATen", "[nn][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  for (const int64_t width : {5, 4096}) {
    auto logits = torch::randn({6, width});
    logits[0].slice(0, 1, 4) = -kInfinity;
    logits[1][2] = -kInfinity;
    logits[2].fill_(-kInfinity);
    logits[3][0] = kInfinity;
    logits[4][3] = std::nan("");
    logits[5] = logits[5] * 1e4;
    const auto target = torch::tensor({0, 2, 0, 0, 1, 4}, at::kLong);
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      const auto cast = logits.to(dtype);
      const auto options = CrossEntropyLossOptions().reduction(torch::kNone);
      const auto truth = by_aten(cast.to(at::kDouble), target, options);
      const auto ours = fused(cast.to(at::kCUDA), target.to(at::kCUDA), options);
      INFO(dtype << ", width " << width << ours.loss << truth.loss);
      CHECK(difference(ours.loss, truth.loss) < 1e-2);  // of 1e4
      CHECK(difference(ours.gradient, truth.gradient) < 2e-2);
    }
  }
  const auto none = torch::full({3}, -100, at::kCUDA).to(at::kLong);
  const auto [loss, gradient] = fused(torch::randn({3, 999}, at::kCUDA), none, {});
  CHECK(std::isnan(loss.item<double>()));
  CHECK(gradient.count_nonzero().item<int64_t>() == 0);
}

TEST_CASE("the kernels reach logits beyond the 2^31st", "[nn][gpu][large]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  constexpr int64_t kRows = 42800, kWidth = 50304;
  auto logits =
      torch::zeros({kRows, kWidth}, torch::TensorOptions(at::kBFloat16).device(at::kCUDA));
  logits.slice(0, kRows - 3).normal_();
  const auto target = classes({kRows}, kWidth, at::kCUDA);
  const auto last = logits.slice(0, kRows - 3).to(at::kDouble);
  const auto options = CrossEntropyLossOptions().reduction(torch::kSum);
  const auto truth = by_aten(last, target.slice(0, kRows - 3), options);
  const auto losses = nn::cross_entropy_rows_in_place(logits, {target, -100, 0.0});
  const auto sum = losses.slice(0, kRows - 3).sum();
  INFO(sum << truth.loss);
  CHECK(difference(sum, truth.loss) < 1e-3);
  CHECK(difference(logits.slice(0, kRows - 3), truth.gradient / 0.5) < 4e-3);
  CHECK(std::abs(losses[0].item<double>() - std::log(kWidth)) < 1e-4);
}

TEST_CASE("the same logits give the same bits, and the kernels' speed is shown",
          "[nn][gpu][large]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  constexpr int64_t kRows = 32768, kWidth = 50304, kTimes = 20;
  const auto logits =
      torch::empty({kRows, kWidth}, torch::TensorOptions(at::kBFloat16).device(at::kCUDA))
          .normal_();
  const nn::RowTargets targets{classes({kRows}, kWidth, at::kCUDA), -100, 0.0};
  const double bytes = 2.0 * kRows * kWidth * kTimes / 1e9;  // of one pass, in GB and all times
  at::Tensor over = logits.clone();
  const auto first = nn::cross_entropy_rows_in_place(over, targets);
  const auto gradient = over.clone();
  over.copy_(logits);
  CHECK(nn::cross_entropy_rows_in_place(over, targets).equal(first));
  CHECK(over.equal(gradient));

  const auto forward = nn::cross_entropy_rows(logits, targets);
  const auto one = torch::ones({}, at::kCUDA);
  const auto timed = [&](const std::function<void()>& work) {
    work();
    return gpu_ms([&] {
      for (int i = 0; i < kTimes; ++i) work();
    });
  };
  const double in_place = timed([&] { nn::cross_entropy_rows_in_place(over, targets); });
  const double alone = timed([&] { nn::cross_entropy_rows(logits, targets); });
  const double backward = timed([&] {
    nn::cross_entropy_gradient(logits, forward, targets, {one, {}}, over);
  });
  const double summed = timed([&] { nn::reduced(first, targets, nn::Reduction::kMean); });
  WARN("[32768, 50304] bfloat16: loss and gradient in place "
       << in_place / kTimes << " ms, " << 2 * bytes / in_place << " TB/s; loss alone "
       << alone / kTimes << " ms, " << bytes / alone << " TB/s; gradient " << backward / kTimes
       << " ms, " << 2 * bytes / backward << " TB/s; mean " << summed / kTimes << " ms");
}

TEST_CASE("a target that is no class, in a process of its own", "[.no-class]") {
  const auto logits = torch::randn({5, 7}, at::kCUDA);
  nn::fused_cross_entropy(logits, torch::full({5}, 7, at::kLong).to(at::kCUDA));
  torch::cuda::synchronize();
}

TEST_CASE("a target that is no class ends in a device-side assertion", "[nn][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  // compute-sanitizer would count the assertion as an error of the kernel.
  if (std::getenv("LIGHTNING_SANITIZER") != nullptr) return;
  std::array<char, 4096> self{};
  REQUIRE(readlink("/proc/self/exe", self.data(), self.size() - 1) > 0);
  const auto command = std::string("'") + self.data() + "' '[.no-class]' 2>&1";
  std::string output;
  auto* const pipe = popen(command.c_str(), "r");
  REQUIRE(pipe != nullptr);
  std::array<char, 1024> part{};
  while (std::fgets(part.data(), part.size(), pipe) != nullptr) output += part.data();
  CHECK(pclose(pipe) != 0);
  CHECK_THAT(output, Contains("a target is a class, from 0 to the number of logits"));
  CHECK_THAT(output, Contains("device-side assert"));
}
