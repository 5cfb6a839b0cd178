#include "lightning/nn/lm_head.h"

#include <ATen/autocast_mode.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <cmath>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "lightning/nn/cross_entropy.h"
#include "lightning/param/working_copy.h"

using namespace lightning;
using Catch::Matchers::Contains;
using torch::nn::CrossEntropyLossOptions;

namespace {

// A loss and its gradients; undefined ones for what is frozen.
struct Result {
  at::Tensor loss, hidden, weight, bias;
};

struct Setting {
  at::Tensor hidden, target, weight, bias;
  CrossEntropyLossOptions options;
};

// Weights that differ from row to row, where the loss has rows.
void run_backward(const at::Tensor& loss) {
  loss.backward(torch::linspace(0.5, 2.0, loss.numel(), loss.options()).view(loss.sizes()));
}

Result by_head(const Setting& setting, int64_t chunk_rows, at::ScalarType cast_to = at::kDouble) {
  const auto& weight = setting.weight;
  nn::LMHead head(nn::LMHeadOptions(weight.size(1), weight.size(0))
                      .bias(setting.bias.defined())
                      .chunk_rows(chunk_rows));
  head->to(weight.device(), weight.scalar_type());
  {
    const torch::NoGradGuard no_grad;
    head->weight.copy_(weight);
    head->weight.set_requires_grad(weight.requires_grad());
    if (setting.bias.defined()) head->bias.copy_(setting.bias);
  }
  const auto hidden = setting.hidden.detach().requires_grad_(setting.hidden.requires_grad());
  const auto device = hidden.device().type();
  const bool cast = cast_to != at::kDouble;
  if (cast) {
    at::autocast::set_autocast_dtype(device, cast_to);
    at::autocast::set_autocast_enabled(device, true);
  }
  const auto loss = head->loss(hidden, setting.target, setting.options);
  if (cast) {
    at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(device, false);
  }
  run_backward(loss);
  return {loss.detach(), hidden.grad(), head->weight.grad(),
          setting.bias.defined() ? head->bias.grad() : at::Tensor()};
}

// at::linear and at::cross_entropy_loss in `dtype`; float32 for the loss of 16-bit logits.
Result by_aten(const Setting& setting, at::ScalarType dtype = at::kDouble) {
  const auto leaf = [](const at::Tensor& tensor, bool wants) {
    return tensor.defined() ? tensor.detach().clone().requires_grad_(wants) : tensor;
  };
  const auto hidden = leaf(setting.hidden, setting.hidden.requires_grad());
  const auto weight = leaf(setting.weight, setting.weight.requires_grad());
  const auto bias = leaf(setting.bias, true);
  const auto logits =
      at::linear(hidden.to(dtype), weight.to(dtype),
                 bias.defined() ? std::make_optional(bias.to(dtype)) : std::nullopt);
  const auto loss = at::cross_entropy_loss(
      logits.reshape({-1, weight.size(0)}).to(nn::loss_dtype(dtype)), setting.target.reshape({-1}),
      std::nullopt, static_cast<int64_t>(nn::reduction_of(setting.options)),
      setting.options.ignore_index(), setting.options.label_smoothing());
  run_backward(loss);
  return {loss.detach().reshape(loss.dim() == 0 ? loss.sizes() : setting.target.sizes()),
          hidden.grad(), weight.grad(), bias.defined() ? bias.grad() : at::Tensor()};
}

// |left - right| / |right|, in norms over all elements; 0 where both are undefined.
double error(const at::Tensor& left, const at::Tensor& right) {
  if (!left.defined() && !right.defined()) return 0;
  if (left.defined() != right.defined() || left.sizes() != right.sizes()) return 1e9;
  const auto a = left.to(at::kDouble), b = right.to(left.device(), at::kDouble);
  if (a.numel() == 0) return 0;
  if (a.isnan().all().item<bool>() && b.isnan().all().item<bool>()) return 0;
  const double off = (a - b).norm().item<double>(), size = b.norm().item<double>();
  return off == 0 ? 0 : off / size;
}

std::string words(const Setting& setting, int64_t chunk_rows) {
  std::ostringstream out;
  out << "hidden " << setting.hidden.sizes() << ", reduction "
      << static_cast<int>(nn::reduction_of(setting.options)) << ", smoothing "
      << setting.options.label_smoothing() << ", ignore_index " << setting.options.ignore_index()
      << ", " << (setting.bias.defined() ? "a bias, " : "") << "chunks of " << chunk_rows;
  return out.str();
}

std::vector<CrossEntropyLossOptions> some_options(int64_t a_class) {
  return {CrossEntropyLossOptions(),
          CrossEntropyLossOptions().ignore_index(a_class).label_smoothing(0.1),
          CrossEntropyLossOptions().reduction(torch::kSum).ignore_index(a_class),
          CrossEntropyLossOptions().reduction(torch::kNone).ignore_index(a_class),
          CrossEntropyLossOptions().reduction(torch::kNone).label_smoothing(0.2)};
}

Setting setting_of(std::vector<int64_t> rows, int64_t width, int64_t classes, at::ScalarType dtype,
                   at::Device device = at::kCPU) {
  const auto options = torch::TensorOptions(dtype).device(device);
  Setting setting;
  setting.target = torch::randint(classes, rows, options.dtype(at::kLong));
  rows.push_back(width);
  setting.hidden = torch::randn(rows, options).requires_grad_();
  setting.weight = (0.3 * torch::randn({classes, width}, options)).requires_grad_();
  return setting;
}

struct Model : torch::nn::Module {
  Model() {
    wte = register_module("wte", torch::nn::Embedding(11, 4));
    head = register_module("head", nn::LMHead(wte->weight));
  }
  torch::nn::Embedding wte{nullptr};
  nn::LMHead head{nullptr};
};

}  // namespace

TEST_CASE("an LMHead's loss is ATen's in float64, whole and in chunks", "[nn]") {
  torch::manual_seed(1);
  for (const auto& rows : std::vector<std::vector<int64_t>>{{7}, {2, 5}, {0}, {1, 2, 3}, {}}) {
    auto setting = setting_of(rows, 4, 9, at::kDouble);
    const auto count = setting.target.numel();
    for (const bool biased : {false, true}) {
      setting.bias = biased ? torch::randn({9}, at::kDouble) : at::Tensor();
      for (const auto& options :
           some_options(count > 0 ? setting.target.flatten()[0].item<int64_t>() : 0)) {
        setting.options = options;
        const auto truth = by_aten(setting);
        for (const int64_t chunk_rows : {0, 1, 3, 7, 100}) {
          INFO(words(setting, chunk_rows));
          const auto ours = by_head(setting, chunk_rows);
          CHECK(error(ours.loss, truth.loss) < 1e-13);
          CHECK(error(ours.hidden, truth.hidden) < 1e-13);
          CHECK(error(ours.weight, truth.weight) < 1e-13);
          CHECK(error(ours.bias, truth.bias) < 1e-13);
        }
      }
    }
  }
}

TEST_CASE("an LMHead computes only the gradients that somebody wants", "[nn]") {
  torch::manual_seed(2);
  auto setting = setting_of({6}, 4, 9, at::kDouble);
  for (const bool of_hidden : {true, false}) {
    setting.hidden.set_requires_grad(of_hidden);
    setting.weight.set_requires_grad(!of_hidden);
    for (const auto& options : some_options(1)) {
      setting.options = options;
      const auto truth = by_aten(setting);
      for (const int64_t chunk_rows : {0, 4}) {
        INFO(words(setting, chunk_rows));
        const auto ours = by_head(setting, chunk_rows);
        CHECK(ours.hidden.defined() == of_hidden);
        CHECK(ours.weight.defined() != of_hidden);
        CHECK(error(ours.hidden, truth.hidden) < 1e-13);
        CHECK(error(ours.weight, truth.weight) < 1e-13);
      }
    }
  }
}

TEST_CASE("the input and the target of an LMHead may have any strides", "[nn]") {
  torch::manual_seed(3);
  auto setting = setting_of({4, 6}, 5, 9, at::kDouble);
  setting.hidden = torch::randn({5, 6, 4}, at::kDouble).permute({2, 1, 0}).requires_grad_();
  setting.target = torch::randint(9, {6, 4}).t();
  setting.weight = torch::randn({5, 9}, at::kDouble).t().requires_grad_();
  const auto truth = by_aten(setting);
  for (const int64_t chunk_rows : {0, 5}) {
    const auto ours = by_head(setting, chunk_rows);
    CHECK(error(ours.loss, truth.loss) < 1e-13);
    CHECK(error(ours.hidden, truth.hidden) < 1e-13);
    CHECK(error(ours.weight, truth.weight) < 1e-13);
  }
}

TEST_CASE("an LMHead under autocast is no worse than ATen's operators in 16 bits", "[nn]") {
  torch::manual_seed(4);
  for (const auto dtype : {at::kBFloat16, at::kHalf}) {
    auto setting = setting_of({64}, 32, 50, at::kFloat);
    for (const auto& options : some_options(3)) {
      setting.options = options;
      const auto truth = by_aten(setting);
      const auto theirs = by_aten(setting, dtype);
      for (const int64_t chunk_rows : {0, 20}) {
        INFO(dtype << ", " << words(setting, chunk_rows));
        const auto ours = by_head(setting, chunk_rows, dtype);
        CHECK(ours.loss.scalar_type() == at::kFloat);
        CHECK(ours.hidden.scalar_type() == at::kFloat);
        CHECK(ours.weight.scalar_type() == at::kFloat);
        INFO("weights off by " << error(ours.weight, truth.weight) << ", ATen's by "
                               << error(theirs.weight, truth.weight));
        CHECK(error(ours.loss, truth.loss) <= 1.05 * error(theirs.loss, truth.loss) + 1e-6);
        CHECK(error(ours.hidden, truth.hidden) <= 1.1 * error(theirs.hidden, truth.hidden));
        CHECK(error(ours.weight, truth.weight) <= 1.1 * error(theirs.weight, truth.weight));
      }
    }
  }
}

TEST_CASE("an LMHead kept in 16 bits has gradients in its own dtype", "[nn]") {
  torch::manual_seed(5);
  const auto wide = setting_of({12}, 8, 20, at::kFloat);
  auto setting = wide;
  setting.hidden = wide.hidden.detach().to(at::kBFloat16).requires_grad_();
  setting.weight = wide.weight.detach().to(at::kBFloat16).requires_grad_();
  const auto truth = by_aten(setting), theirs = by_aten(setting, at::kBFloat16);
  for (const int64_t chunk_rows : {0, 5}) {
    const auto ours = by_head(setting, chunk_rows);
    CHECK(ours.loss.scalar_type() == at::kFloat);
    CHECK(ours.weight.scalar_type() == at::kBFloat16);
    CHECK(error(ours.weight, truth.weight) < 1e-2);
    CHECK(error(ours.hidden, truth.hidden) < 1e-2);
  }
}

TEST_CASE("an LMHead under autocast reads the optimizer's copy of its weight", "[nn]") {
  torch::manual_seed(6);
  auto head = nn::LMHead(8, 20);
  const auto hidden = torch::randn({3, 8});
  const auto target = torch::randint(20, {3});
  WorkingCopies copies(at::kBFloat16);
  copies.want(head->weight).zero_();  // shows which of the two is read
  const auto scope = WorkingCopies::use(&copies);
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const auto loss = head->loss(hidden, target);
  const auto logits = head->forward(hidden);
  at::autocast::set_autocast_enabled(at::kCPU, false);
  CHECK(loss.item<double>() == Approx(std::log(20)));
  CHECK(logits.scalar_type() == at::kBFloat16);
  CHECK(logits.count_nonzero().item<int64_t>() == 0);
}

TEST_CASE("class weights and probabilities reach an LMHead's loss", "[nn]") {
  torch::manual_seed(7);
  auto head = nn::LMHead(4, 9);
  head->to(at::kDouble);
  const auto hidden = torch::randn({2, 3, 4}, at::kDouble);
  const auto logits = head->forward(hidden).view({6, 9});
  const auto target = torch::randint(9, {2, 3});
  const auto weight = torch::rand({9}, at::kDouble);
  const auto probabilities = torch::rand({2, 3, 9}, at::kDouble).softmax(-1);
  const auto same = [](const at::Tensor& left, const at::Tensor& right) {
    return at::allclose(left, right, 1e-12, 1e-12);
  };
  CHECK(same(head->loss(hidden, target, CrossEntropyLossOptions().weight(weight)),
             at::cross_entropy_loss(logits, target.view({6}), weight)));
  CHECK(same(head->loss(hidden, probabilities, CrossEntropyLossOptions().reduction(torch::kNone)),
             at::cross_entropy_loss(logits, probabilities.view({6, 9}), {}, at::Reduction::None)
                 .view({2, 3})));
  auto chunked = nn::LMHead(nn::LMHeadOptions(4, 9).chunk_rows(2));
  CHECK_THROWS_WITH(chunked->loss(hidden.to(at::kFloat), probabilities),
                    Contains("chunk_rows 2") && Contains("Leave chunk_rows at 0"));
}

TEST_CASE("backward can run twice where its graph is retained", "[nn]") {
  torch::manual_seed(8);
  for (const auto& options : some_options(1)) {
    for (const int64_t chunk_rows : {0, 2}) {
      auto head = nn::LMHead(nn::LMHeadOptions(4, 9).chunk_rows(chunk_rows));
      const auto hidden = torch::randn({5, 4}).requires_grad_();
      const auto loss = head->loss(hidden, torch::randint(9, {5}), options).sum();
      loss.backward({}, /*retain_graph=*/true);
      const auto of_hidden = hidden.grad().clone(), of_weight = head->weight.grad().clone();
      loss.backward();
      CHECK(at::allclose(hidden.grad(), 2 * of_hidden));
      CHECK(at::allclose(head->weight.grad(), 2 * of_weight));
    }
  }
}

TEST_CASE("a weight that an embedding shares is registered in both", "[nn]") {
  torch::manual_seed(9);
  const auto before = torch::randn({1});
  torch::manual_seed(9);
  const auto table = torch::zeros({11, 4}).requires_grad_();
  const nn::LMHead alone(table);  // draws nothing
  CHECK(torch::randn({1}).equal(before));
  CHECK(alone->weight.is_same(table));
  CHECK(alone->options.out_features() == 11);
  CHECK_FALSE(alone->bias.defined());

  Model model;
  const auto named = model.named_parameters();
  CHECK(named.size() == 2);
  CHECK(named["wte.weight"].is_same(named["head.weight"]));
  model.to(at::kDouble);
  CHECK(model.head->weight.is_same(model.wte->weight));
  CHECK(model.head->weight.scalar_type() == at::kDouble);

  // The gradient is the sum of both uses.
  const auto input = torch::randint(11, {6}), target = torch::randint(11, {6});
  const auto weight = model.wte->weight.detach().clone().requires_grad_();
  at::cross_entropy_loss(at::linear(at::embedding(weight, input), weight), target).backward();
  model.head->loss(model.wte->forward(input), target).backward();
  CHECK(at::allclose(model.wte->weight.grad(), weight.grad(), 1e-12, 1e-12));

  // An archive of the module has both keys, and gives both back.
  std::stringstream file;
  torch::serialize::OutputArchive out;
  model.save(out);
  out.save_to(file);
  Model other;
  other.to(at::kDouble);
  torch::serialize::InputArchive in;
  in.load_from(file);
  other.load(in);
  CHECK(other.head->weight.is_same(other.wte->weight));
  CHECK(other.head->weight.equal(model.wte->weight));
}

TEST_CASE("an LMHead is tied later too, and says what an assignment misses", "[nn]") {
  nn::LMHead head(4, 11);
  const torch::nn::Embedding wte(11, 4);
  head->weight = wte->weight;
  CHECK_THROWS_WITH(head->forward(torch::randn({2, 4})), Contains("tie(embedding->weight)"));
  CHECK_THROWS_WITH(head->loss(torch::randn({2, 4}), torch::zeros({2}, at::kLong)),
                    Contains("tie(embedding->weight)"));
  head->tie(wte->weight);
  CHECK(head->named_parameters()["weight"].is_same(wte->weight));
  CHECK(head->forward(torch::randn({2, 4})).sizes() == at::IntArrayRef({2, 11}));
  CHECK_THROWS_WITH(head->tie(torch::zeros({11, 5})), Contains("[11, 4]") && Contains("[11, 5]"));
  CHECK_THROWS_WITH(nn::LMHead(torch::zeros({3})), Contains("[3]"));
}

TEST_CASE("an LMHead has a Linear's parameters and is copied as one", "[nn]") {
  torch::manual_seed(10);
  torch::nn::Linear linear(torch::nn::LinearOptions(4, 9).bias(false));
  torch::manual_seed(10);
  nn::LMHead head(nn::LMHeadOptions(4, 9).chunk_rows(3));
  CHECK(head->weight.equal(linear->weight));
  const auto hidden = torch::randn({2, 3, 4});
  CHECK(at::allclose(head->forward(hidden), linear->forward(hidden)));
  const auto copy = std::dynamic_pointer_cast<nn::LMHeadImpl>(head->clone());
  REQUIRE(copy != nullptr);
  CHECK(copy->weight.equal(head->weight));
  CHECK_FALSE(copy->weight.is_same(head->weight));
  CHECK(copy->chunk_rows() == 3);
  std::ostringstream printed;
  printed << *head;
  CHECK(printed.str() == "lightning::nn::LMHead(in_features=4, out_features=9, bias=false)");
}

TEST_CASE("what an LMHead cannot do is refused in words", "[nn]") {
  nn::LMHead head(4, 9);
  const auto hidden = torch::randn({5, 4}).requires_grad_();
  const auto target = torch::randint(9, {5});
  CHECK_THROWS_WITH(head->loss(hidden, torch::randint(9, {4})),
                    Contains("[5, 4]") && Contains("[4]"));
  CHECK_THROWS_WITH(head->loss(torch::randn({5, 3}), target), Contains("must be in_features"));
  CHECK_THROWS_WITH(head->loss(hidden.to(at::kDouble), target), Contains("expected one dtype"));
  CHECK_THROWS_WITH(head->loss(hidden, torch::full({5}, 9, at::kLong)), Contains("target of 9"));
  CHECK_THROWS_WITH(nn::LMHead(nn::LMHeadOptions(4, 9).chunk_rows(-1)), Contains("chunk_rows -1"));
  const auto loss = head->loss(hidden, target);
  CHECK_THROWS_WITH(torch::autograd::grad({loss}, {hidden}, {}, true, true),
                    Contains("LMHead's loss") && Contains("forward()"));
  const torch::NoGradGuard no_grad;
  CHECK_FALSE(head->loss(hidden, target).requires_grad());
}

TEST_CASE("an LMHead on a GPU is ATen's, in every precision and in chunks", "[nn][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  torch::manual_seed(11);
  for (const int64_t classes : {1003, 4096}) {
    auto setting = setting_of({3, 67}, 96, classes, at::kFloat, at::kCUDA);
    for (const bool biased : {false, true}) {
      setting.bias = biased ? torch::randn({classes}, at::kCUDA) : at::Tensor();
      for (const auto& options : some_options(setting.target[0][0].item<int64_t>())) {
        setting.options = options;
        const auto truth = by_aten(setting);
        for (const auto dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
          const auto theirs = by_aten(setting, dtype);
          for (const int64_t chunk_rows : {0, 50}) {
            INFO(dtype << ", " << classes << " classes, " << words(setting, chunk_rows));
            const auto ours =
                by_head(setting, chunk_rows, dtype == at::kFloat ? at::kDouble : dtype);
            const auto check = [&](const char* of, const at::Tensor& our, const at::Tensor& their,
                                   const at::Tensor& to) {
              INFO(of << " off by " << error(our, to) << ", ATen's by " << error(their, to));
              if (our.defined()) CHECK(our.scalar_type() == at::kFloat);
              CHECK(error(our, to) <= 1.1 * error(their, to) + 2e-6);
            };
            check("loss", ours.loss, theirs.loss, truth.loss);
            check("hidden", ours.hidden, theirs.hidden, truth.hidden);
            check("weight", ours.weight, theirs.weight, truth.weight);
            check("bias", ours.bias, theirs.bias, truth.bias);
          }
        }
      }
    }
  }
}

TEST_CASE("an LMHead's logits exist once, and in chunks never whole", "[nn][gpu][large]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  constexpr int64_t kRows = 16384, kWidth = 256, kClasses = 50304;
  constexpr int64_t kLogits = 2 * kRows * kClasses, kWeight = 4 * kWidth * kClasses;
  auto* const allocator = c10::getDeviceAllocator(at::kCUDA);
  const auto peak_of = [&](int64_t chunk_rows) {
    const auto setting = setting_of({kRows}, kWidth, kClasses, at::kFloat, at::kCUDA);
    torch::cuda::synchronize();
    allocator->resetPeakStats(0);
    const auto before = allocator->getDeviceStats(0).allocated_bytes[0].current;
    by_head(setting, chunk_rows, at::kBFloat16);
    torch::cuda::synchronize();
    return allocator->getDeviceStats(0).allocated_bytes[0].peak - before;
  };
  const auto whole = peak_of(0), chunked = peak_of(2048);
  INFO("logits " << kLogits << ", weight " << kWeight << ", peaks " << whole << " and " << chunked);
  // Beside the logits: weight, its copy and gradients, the input and its own, cuBLAS' workspace.
  CHECK(whole < kLogits + 6 * kWeight + 12 * kRows * kWidth);
  CHECK(chunked < kLogits / 4 + 6 * kWeight + 12 * kRows * kWidth);
}
