#include "lightning/optim/fused_step.h"

#include <torch/torch.h>

#include <catch2/catch.hpp>

#include "lightning/optim/factories.h"
#include "lightning/optim/optimizer_state.h"
#include "lightning/optim/step_count.h"
#include "lightning/optim/torch_optimizers.h"
#include "lightning/param/working_copy.h"
#include "lightning/recording.h"
#include "lightning/step/graph_device.h"
#include "tests/optim/state_json.h"
#include "tests/support/python.h"

using namespace lightning;

namespace {

const std::vector<std::vector<int64_t>> kShapes = {{33, 17}, {1000}, {1}, {}, {257, 129}, {0}};

std::shared_ptr<torch::optim::Optimizer> make(const std::string& name, const Json& options,
                                              const std::vector<at::Tensor>& params) {
  return registry<OptimizerFactory>().make(name, options)->make(params);
}

std::vector<at::Tensor> random_params(at::TensorOptions options = {}) {
  std::vector<at::Tensor> params;
  for (const auto& shape : kShapes) {
    params.push_back(
        torch::randn(shape, options.device(at::kCPU)).to(options.device()).requires_grad_());
  }
  return params;
}

void set_random_gradients(const std::vector<at::Tensor>& params) {
  for (const at::Tensor& p : params) {
    p.mutable_grad() =
        torch::randn(p.sizes(), p.options().device(at::kCPU).requires_grad(false)).to(p.device());
  }
}

// As torch's StepLR(step_size=10, gamma=0.5).
void halve_every_tenth(torch::optim::Optimizer& optimizer, int step) {
  if (step % 10 != 9) return;
  for (auto& group : optimizer.param_groups()) {
    group.options().set_lr(group.options().get_lr() * 0.5);
  }
}

// All bits of all numbers, at their places.
int64_t checksum(const std::vector<at::Tensor>& params) {
  const torch::NoGradGuard no_grad;
  int64_t sum = 0;
  for (const at::Tensor& p : params) {
    const auto bits = p.detach().flatten().view(p.element_size() == 8 ? at::kLong : at::kInt);
    sum += (bits.to(at::kLong) * torch::arange(1, bits.numel() + 1)).sum().item<int64_t>();
  }
  return sum;
}

constexpr const char* kScript = R"(
import json, sys, torch
torch.set_num_threads(1)
out = []
for name, options in json.loads(sys.argv[1]):
    torch.manual_seed(5)
    dtype = getattr(torch, options.pop("dtype", "float32"))
    params = [torch.nn.Parameter(torch.randn(s, dtype=dtype)) for s in json.loads(sys.argv[2])]
    opt = getattr(torch.optim, name)(params, **options)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 10, 0.5)
    for step in range(30):
        for p in params:
            p.grad = torch.randn(p.shape, dtype=dtype)
        opt.step()
        schedule.step()
    sum = 0
    for p in params:
        bits = p.detach().flatten().view(torch.int64 if p.element_size() == 8 else torch.int32)
        sum += int((bits.long() * torch.arange(1, bits.numel() + 1)).sum())
    out.append((sum + 2**63) % 2**64 - 2**63)
json.dump(out, sys.stdout)
)";

const Json& runs() {
  static const Json runs = Json::parse(R"([
    ["SGD", {"lr": 0.1}],
    ["SGD", {"lr": 0.1, "weight_decay": 0.01}],
    ["SGD", {"lr": 0.1, "weight_decay": 0.01, "dtype": "float64"}],
    ["SGD", {"lr": 0.1, "momentum": 0.9}],
    ["SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}],
    ["SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": true}],
    ["Adam", {}],
    ["Adam", {"lr": 0.01, "weight_decay": 0.1}],
    ["Adam", {"lr": 0.01, "betas": [0.8, 0.95], "weight_decay": 0.1, "amsgrad": true}],
    ["Adam", {"lr": 0.01, "dtype": "float64"}],
    ["AdamW", {}],
    ["AdamW", {"lr": 0.01, "weight_decay": 0.2, "amsgrad": true}],
    ["Adagrad", {"lr": 0.1}],
    ["Adagrad", {"lr": 0.1, "lr_decay": 0.01, "weight_decay": 0.01,
                 "initial_accumulator_value": 0.1}]
  ])");
  return runs;
}

struct Twice : torch::optim::Adam {
  using torch::optim::Adam::Adam;
  at::Tensor step(LossClosure closure) override {
    ++steps;
    return torch::optim::Adam::step(closure);
  }
  int steps = 0;
};

at::Tensor scalar(double value, c10::Device device = at::kCPU) {
  return torch::full({}, value, at::TensorOptions(device).dtype(at::kFloat));
}

}  // namespace

TEST_CASE("on a CPU fused steps are Python's default bit for bit", "[optim]") {
  torch::set_num_threads(1);
  const Json expected =
      Json::parse(testing::run_python(kScript, {runs().dump(), Json(kShapes).dump()}));
  for (size_t i = 0; i < runs().size(); ++i) {
    INFO(runs()[i]);
    Json options = runs()[i][1];
    const bool is_double = options.value("dtype", "") == "float64";
    options.erase("dtype");
    torch::manual_seed(5);
    const auto params = random_params(is_double ? at::kDouble : at::kFloat);
    const auto optimizer = make(runs()[i][0], options, params);
    for (int step = 0; step < 30; ++step) {
      set_random_gradients(params);
      fused_step(*optimizer);
      halve_every_tenth(*optimizer, step);
    }
    CHECK(checksum(params) == expected[i].get<int64_t>());
  }
}

TEST_CASE("a fused step runs its closure with gradients and gives its loss", "[optim]") {
  for (const std::string name : {"SGD", "AdamW", "Adagrad", "RMSprop", "LBFGS"}) {
    auto weight = torch::ones({2}).requires_grad_();
    const auto optimizer = make(name, Json{{"lr", 0.1}}, {weight});
    const torch::NoGradGuard no_grad;
    const at::Tensor loss = fused_step(*optimizer, [&] {
      CHECK(at::GradMode::is_enabled());
      optimizer->zero_grad();
      at::Tensor loss = weight.square().sum();
      loss.backward();
      return loss;
    });
    INFO(name);
    CHECK(loss.item<double>() == 2);
    CHECK(weight[0].item<double>() < 1);
  }
}

TEST_CASE("a class derived from a fused optimizer keeps its own step", "[optim]") {
  auto weight = torch::ones({2}).requires_grad_();
  weight.mutable_grad() = torch::ones({2});
  Twice twice({weight}, torch::optim::AdamOptions(0.1));
  fused_step(twice);
  CHECK(twice.steps == 1);
}

TEST_CASE("groups step with their own options, and sparse gradients by the optimizer's own step",
          "[optim]") {
  auto slow = torch::ones({3}).requires_grad_(), fast = torch::ones({3}).requires_grad_();
  auto sparse = torch::ones({3, 2}).requires_grad_();
  torch::optim::SGD sgd({slow}, torch::optim::SGDOptions(0.1));
  sgd.add_param_group(torch::optim::OptimizerParamGroup(
      {fast},
      std::make_unique<torch::optim::SGDOptions>(torch::optim::SGDOptions(1.0).weight_decay(0.5))));
  slow.mutable_grad() = torch::ones({3});
  fast.mutable_grad() = torch::ones({3});
  fused_step(sgd);
  CHECK(slow[0].item<float>() == Approx(0.9f));
  CHECK(fast[0].item<float>() == Approx(-0.5f));

  sgd.param_groups()[0].params().push_back(sparse);
  sparse.mutable_grad() = torch::ones({3, 2}).to_sparse();
  fused_step(sgd);
  CHECK(slow[0].item<float>() == Approx(0.8f));
  CHECK(sparse[2][1].item<float>() == Approx(0.9f));
}

TEST_CASE("a parameter begins to count with its first gradient", "[optim]") {
  auto early = torch::ones({3}).requires_grad_(), late = torch::ones({3}).requires_grad_();
  torch::optim::AdamW adamw({early, late}, torch::optim::AdamWOptions(0.1));
  for (int step = 0; step < 3; ++step) {
    early.mutable_grad() = torch::ones({3});
    if (step == 2) late.mutable_grad() = torch::ones({3});
    fused_step(adamw);
  }
  const auto steps_of = [&](const at::Tensor& param) {
    auto& state = *adamw.state().at(param.unsafeGetTensorImpl());
    return static_cast<torch::optim::AdamWParamState&>(state).step();
  };
  CHECK(steps_of(early) == 3);
  CHECK(steps_of(late) == 1);
}

TEST_CASE("found_inf leaves out a step, and a scale is divided out of the gradients", "[optim]") {
  for (const Json& run : runs()) {
    INFO(run);
    Json options = run[1];
    options.erase("dtype");
    torch::manual_seed(5);
    const auto params = random_params(), same = random_params();
    for (size_t i = 0; i < params.size(); ++i) same[i].data().copy_(params[i]);
    const auto scaled = make(run[0], options, params), plain = make(run[0], options, same);
    const auto check_equal = [&] {
      for (size_t i = 0; i < params.size(); ++i) CHECK(torch::equal(params[i], same[i]));
    };
    for (const double found_inf : {1.0, 0.0, 1.0, 0.0}) {
      set_random_gradients(params);
      for (size_t i = 0; i < params.size(); ++i) {
        same[i].mutable_grad() = params[i].grad().clone();
        params[i].mutable_grad().mul_(1024);
      }
      StepAids aids;
      aids.grad_scale = scalar(1024);
      aids.found_inf = scalar(found_inf);
      fused_step(*scaled, nullptr, aids);
      if (found_inf == 0) fused_step(*plain);
      check_equal();
      if (found_inf == 0) CHECK(torch::equal(params[0].grad(), same[0].grad()));
    }
  }
}

TEST_CASE("copies that were wanted are current after a step, and no more once somebody writes",
          "[optim]") {
  WorkingCopies copies(at::kBFloat16);
  StepAids aids;
  aids.copies = &copies;
  for (const std::string name : {"SGD", "AdamW", "RMSprop"}) {
    auto wanted = torch::randn({5, 3}).requires_grad_(), other = torch::randn({4}).requires_grad_();
    const auto optimizer = make(name, Json{{"lr", 0.1}}, {wanted, other});
    copies.want(wanted);
    wanted.mutable_grad() = torch::randn({5, 3});
    other.mutable_grad() = torch::randn({4});
    fused_step(*optimizer, nullptr, aids);
    INFO(name);
    REQUIRE(copies.current(wanted).defined());
    CHECK(torch::equal(copies.current(wanted), wanted.detach().to(at::kBFloat16)));
    CHECK_FALSE(copies.current(other).defined());
    torch::nn::init::zeros_(wanted);
    CHECK_FALSE(copies.current(wanted).defined());
  }
}

TEST_CASE("what was recorded is asked of GPUs alone", "[optim]") {
  auto weight = torch::ones({2}).requires_grad_();
  torch::optim::AdamW adamw({weight}, torch::optim::AdamWOptions(0.1));
  CHECK(upload_options(adamw));
  weight.mutable_grad() = torch::ones({2});
  {
    std::vector<at::Tensor> kept;
    const RecordingScope recording(kept);  // as by a device that has no recordings
    fused_step(adamw);
  }
  count_step(adamw);
  CHECK(optimizer_state_dict(adamw).at("state").at(0).at("step").as_tensor().item<float>() == 1);
}

// ---- Counts on the device -----------------------------------------------------------------------

TEST_CASE("a counted state is the state it was, and settles what the device counted", "[optim]") {
  using Counted = CountedState<torch::optim::AdamParamState>;
  auto weight = torch::ones({2}).requires_grad_();
  weight.mutable_grad() = torch::ones({2});
  torch::optim::Adam adam({weight}, torch::optim::AdamOptions(0.1));
  adam.step();
  auto& entry = adam.state().at(weight.unsafeGetTensorImpl());
  const auto mean = static_cast<torch::optim::AdamParamState&>(*entry).exp_avg();
  CHECK(Counted::of(entry.get()) == nullptr);
  auto& counted = Counted::make(entry);
  CHECK(Counted::of(entry.get()) == &counted);
  CHECK(&Counted::make(entry) == &counted);
  auto& state = static_cast<torch::optim::AdamParamState&>(*entry);
  CHECK(state.exp_avg().is_same(mean));
  CHECK(state.step() == 1);

  CHECK_FALSE(counted.is_placed());
  counted.place(scalar(1));
  CHECK(counted.is_placed());
  counted.advance(/*certain=*/true);
  CHECK(state.step() == 2);
  CHECK_FALSE(counted.is_behind());
  counted.advance(/*certain=*/false);
  CHECK(counted.is_behind());
  counted.on_device().fill_(2);  // it was skipped
  settle_steps(adam);
  CHECK(state.step() == 2);
  CHECK_FALSE(counted.is_behind());

  counted.advance(/*certain=*/false);
  state.step(100);  // a user's number is the one that counts
  CHECK_FALSE(counted.is_placed());
  settle_steps(adam);
  CHECK(state.step() == 100);
}

TEST_CASE("an optimizer's state is written with the counts of the device", "[optim]") {
  auto weight = torch::ones({2}).requires_grad_();
  weight.mutable_grad() = torch::ones({2});
  torch::optim::AdamW adamw({weight}, torch::optim::AdamWOptions(0.1));
  adamw.step();
  auto& entry = adamw.state().at(weight.unsafeGetTensorImpl());
  auto& counted = CountedState<torch::optim::AdamWParamState>::make(entry);
  counted.place(scalar(1));
  counted.advance(/*certain=*/false);
  counted.on_device().fill_(7);
  const State state = optimizer_state_dict(adamw);
  CHECK(state.at("state").at(0).at("step").as_tensor().item<float>() == 7);
  load_optimizer_state_dict(adamw, state);
  CHECK(static_cast<torch::optim::AdamWParamState&>(*adamw.state().at(weight.unsafeGetTensorImpl()))
            .step() == 7);
}

// ---- On a GPU -----------------------------------------------------------------------------------

namespace {

bool no_gpu() {
  if (torch::cuda::is_available()) return false;
  WARN("needs a GPU");
  return true;
}

// Parameters on the CPU, stepped by the optimizer's own step, and the same ones on the GPU.
struct Twins {
  std::vector<at::Tensor> host, device;
  std::shared_ptr<torch::optim::Optimizer> own, fused;

  Twins(const std::string& name, Json options, at::ScalarType dtype = at::kFloat) {
    options.erase("dtype");
    torch::manual_seed(5);
    host = random_params(dtype);
    for (const at::Tensor& p : host) {
      device.push_back(p.detach().to(at::kCUDA, dtype, false, /*copy=*/true).requires_grad_());
    }
    own = make(name, options, host);
    fused = make(name, options, device);
  }
  void set_gradients() const {
    set_random_gradients(host);
    for (size_t i = 0; i < host.size(); ++i) {
      device[i].mutable_grad() = host[i].grad().to(at::kCUDA, host[i].scalar_type(), false, true);
    }
  }
  double largest_difference() const {
    double largest = 0;
    for (size_t i = 0; i < host.size(); ++i) {
      if (host[i].numel() == 0) continue;
      const auto difference = (host[i].detach() - device[i].detach().cpu()).abs().max();
      largest = std::max(largest, difference.item<double>());
    }
    return largest;
  }
  at::Tensor steps_of(size_t i) const {
    return optimizer_state_dict(*fused)
        .at("state")
        .at(static_cast<int64_t>(i))
        .at("step")
        .as_tensor();
  }
};

}  // namespace

TEST_CASE("on a GPU fused steps are the optimizer's own to 1e-6", "[optim][gpu]") {
  if (no_gpu()) return;
  for (const Json& run : runs()) {
    INFO(run);
    const auto dtype = run[1].value("dtype", "") == "float64" ? at::kDouble : at::kFloat;
    const Twins twins(run[0], run[1], dtype);
    for (int step = 0; step < 30; ++step) {
      twins.set_gradients();
      if (step < 3) twins.host[1].mutable_grad() = twins.device[1].mutable_grad() = at::Tensor();
      if (step % 2 == 1) {  // in another order of memory, as a layer may leave it
        auto& grad = twins.device[0].mutable_grad();
        grad = grad.t().contiguous().t();
      }
      twins.own->step();
      fused_step(*twins.fused);
      halve_every_tenth(*twins.own, step);
      halve_every_tenth(*twins.fused, step);
    }
    CHECK(twins.largest_difference() < 5e-6);
    if (run[0] != "SGD") {
      CHECK(twins.steps_of(0).item<float>() == 30);
      CHECK(twins.steps_of(1).item<float>() == 27);
    }
  }
}

TEST_CASE("on a GPU a loaded state goes on as the saved one would have", "[optim][gpu]") {
  if (no_gpu()) return;
  for (const Json& run : runs()) {
    INFO(run);
    const Twins twins(run[0], run[1]), again(run[0], run[1]);
    for (int step = 0; step < 6; ++step) {
      if (step == 3) {
        for (size_t i = 0; i < again.device.size(); ++i) {
          again.device[i].data().copy_(twins.device[i]);
        }
        load_optimizer_state_dict(*again.fused, optimizer_state_dict(*twins.fused));
      }
      twins.set_gradients();
      for (size_t i = 0; i < again.device.size(); ++i) {
        again.device[i].mutable_grad() = twins.device[i].grad().clone();
      }
      fused_step(*twins.fused);
      fused_step(*again.fused);
    }
    for (size_t i = 0; i < again.device.size(); ++i) {
      CHECK(torch::equal(again.device[i], twins.device[i]));
    }
  }
}

TEST_CASE("on a GPU found_inf leaves out a step without being read", "[optim][gpu]") {
  if (no_gpu()) return;
  const bool with_copies = GENERATE(false, true);
  WorkingCopies copies(at::kHalf);
  for (const Json& run : runs()) {
    INFO(run << (with_copies ? " with copies" : ""));
    const Twins twins(run[0], run[1]);
    for (const at::Tensor& p : twins.device) copies.want(p);
    int updates = 0;
    for (const double found_inf : {1.0, 0.0, 0.0, 1.0, 0.0}) {
      twins.set_gradients();
      for (const at::Tensor& p : twins.device) p.mutable_grad().mul_(1024);
      StepAids aids;
      aids.grad_scale = scalar(1024, at::kCUDA);
      aids.found_inf = scalar(found_inf, at::kCUDA);
      if (with_copies) aids.copies = &copies;
      fused_step(*twins.fused, nullptr, aids);
      if (found_inf == 0) {
        twins.own->step();
        ++updates;
      }
      INFO("after " << updates << " updates");
      CHECK(twins.largest_difference() < 5e-6);
    }
    if (run[0] != "SGD") CHECK(twins.steps_of(0).item<float>() == updates);
  }
}

TEST_CASE("the kernel that writes copies steps as LibTorch's does", "[optim][gpu]") {
  if (no_gpu()) return;
  const Json cases = Json::parse(R"([
    ["AdamW", {"lr": 0.01}], ["AdamW", {"lr": 0.01, "weight_decay": 0.2, "amsgrad": true}],
    ["Adam", {"lr": 0.01}], ["Adam", {"lr": 0.01, "weight_decay": 0.1}],
    ["Adam", {"lr": 0.01, "weight_decay": 0.1, "amsgrad": true}]])");
  const auto dtype = GENERATE(at::kHalf, at::kBFloat16);
  for (const Json& one : cases) {
    INFO(one << " " << dtype);
    torch::manual_seed(3);
    WorkingCopies copies(dtype);
    StepAids aids;
    aids.copies = &copies;
    // Whole blocks, one more, one less; tensors that are not aligned; more than a launch takes.
    std::vector<at::Tensor> ours, theirs;
    for (int64_t size : {1, 3, 4, 8191, 8192, 8193, 100003, 3 * 8192}) {
      ours.push_back(torch::randn(size, at::kCUDA));
      ours.push_back(torch::randn(size + 1, at::kCUDA).slice(0, 1).detach());
    }
    for (int i = 0; i < 60; ++i) ours.push_back(torch::randn(5, at::kCUDA));
    for (at::Tensor& p : ours) {
      theirs.push_back(p.clone().requires_grad_());
      p.requires_grad_();
      copies.want(p);
    }
    const auto with = make(one[0], one[1], ours), without = make(one[0], one[1], theirs);
    double largest = 0;
    for (int step = 0; step < 5; ++step) {
      for (size_t i = 0; i < ours.size(); ++i) {
        theirs[i].mutable_grad() = torch::randn_like(theirs[i].detach());
        ours[i].mutable_grad() = theirs[i].grad().clone();
      }
      const auto version = ours[0]._version();
      fused_step(*with, nullptr, aids);
      fused_step(*without);
      CHECK(ours[0]._version() > version);
      for (size_t i = 0; i < ours.size(); ++i) {
        const auto far =
            (ours[i] - theirs[i]).detach().abs() / theirs[i].detach().abs().clamp_min(1);
        largest = std::max(largest, far.max().item<double>());
        REQUIRE(copies.current(ours[i]).defined());
        CHECK(torch::equal(copies.current(ours[i]), ours[i].detach().to(dtype)));
      }
    }
    INFO("largest difference " << largest);
    CHECK(largest < 5e-7);
  }
}

TEST_CASE("in 16 bits on a GPU Adam's kernel steps as LibTorch's does", "[optim][gpu]") {
  if (no_gpu()) return;
  const auto dtype = GENERATE(at::kHalf, at::kBFloat16);
  const bool decoupled = GENERATE(true, false), amsgrad = GENERATE(false, true);
  CAPTURE(dtype, decoupled, amsgrad);
  torch::manual_seed(4);
  // Whole blocks, one more, one less; tensors that are not aligned; more than a launch takes.
  std::vector<at::Tensor> ours, theirs, means, squares, largest, steps;
  const auto add = [&](const at::Tensor& values) {
    ours.push_back(values.clone());
    theirs.push_back(values.clone());
    for (auto* list : {&means, &squares, &largest}) list->push_back(torch::zeros_like(values));
    steps.push_back(torch::zeros({}, at::device(at::kCUDA).dtype(at::kFloat)));
  };
  const auto options = at::device(at::kCUDA).dtype(dtype);
  for (int64_t size : {1, 7, 8, 8191, 8192, 8193, 100003}) {
    add(torch::randn(size, options));
    add(torch::randn(size + 1, options).slice(0, 1));
  }
  for (int i = 0; i < 60; ++i) add(torch::randn(5, options));
  for (auto& p : ours) p.requires_grad_();
  const Json arguments = {{"lr", 0.01}, {"weight_decay", 0.1}, {"amsgrad", amsgrad}};
  const auto optimizer = make(decoupled ? "AdamW" : "Adam", arguments, ours);
  double differing = 0, elements = 0;
  for (int step = 0; step < 5; ++step) {
    std::vector<at::Tensor> gradients;
    for (auto& p : ours) {
      gradients.push_back(torch::randn_like(p.detach()));
      p.mutable_grad() = gradients.back().clone();
    }
    fused_step(*optimizer);
    for (auto& count : steps) count.add_(1);
    const auto none = std::vector<at::Tensor>();
    const auto update = [&](const auto& by) {
      by(theirs, gradients, means, squares, amsgrad ? largest : none, steps, 0.01, 0.9, 0.999, 0.1,
         1e-8, amsgrad, false, std::nullopt, std::nullopt);
    };
    if (decoupled) {
      update([](const auto&... all) { at::_fused_adamw_(all...); });
    } else {
      update([](const auto&... all) { at::_fused_adam_(all...); });
    }
  }
  for (size_t i = 0; i < ours.size(); ++i) {
    const auto got = ours[i].detach().to(at::kDouble), expected = theirs[i].to(at::kDouble);
    // Now and then a sum in another order rounds the other way, which later steps carry on.
    const double unit = dtype == at::kHalf ? 1e-3 : 8e-3;
    CHECK(((got - expected).abs() <= 2 * unit * expected.abs().clamp_min(0.1)).all().item<bool>());
    differing += (got != expected).sum().item<double>();
    elements += static_cast<double>(got.numel());
  }
  INFO(differing << " of " << elements << " elements differ");
  CHECK(differing < 1e-2 * elements);
}

TEST_CASE("a recorded step follows learning rate and counts, and tells when it cannot",
          "[optim][gpu]") {
  if (no_gpu()) return;
  if (cuda_graph_device() == nullptr) {
    WARN("needs a build with CUDA");
    return;
  }
  const bool with_copies = GENERATE(false, true);
  for (const Json& run : runs()) {
    if (run[1].value("dtype", "") == "float64") continue;
    INFO(run << (with_copies ? " with copies" : ""));
    WorkingCopies copies(at::kBFloat16), other_copies(at::kBFloat16);
    StepAids aids, other_aids;
    if (with_copies) aids.copies = &copies;
    if (with_copies) other_aids.copies = &other_copies;
    const Twins recorded(run[0], run[1]), ordinary(run[0], run[1]);
    recorded.set_gradients();
    ordinary.set_gradients();
    const auto device = cuda_graph_device()(recorded.device[0].device());
    REQUIRE(device != nullptr);
    std::unique_ptr<RecordedWork> work;
    for (int step = 0; step < 12; ++step) {
      for (size_t i = 0; i < recorded.device.size(); ++i) {
        const auto values = torch::randn_like(recorded.device[i].detach());
        recorded.device[i].grad().copy_(values);
        ordinary.device[i].grad().copy_(values);
      }
      fused_step(*ordinary.fused, nullptr, other_aids);
      const auto step_recorded = [&] { fused_step(*recorded.fused, nullptr, aids); };
      if (step < 3) {
        device->warm_up(step_recorded);
      } else {
        const bool holds = upload_options(*recorded.fused);
        CHECK(holds == (step != 9));
        if (!holds) work.reset();
        if (work == nullptr) {
          work = device->record([&] {
            std::vector<at::Tensor> kept;
            const RecordingScope recording(kept);
            step_recorded();
          });
        }
        work->launch();
        count_step(*recorded.fused);
      }
      for (size_t i = 0; i < recorded.device.size(); ++i) {
        INFO("step " << step << ", parameter " << i);
        CHECK(torch::equal(recorded.device[i], ordinary.device[i]));
      }
      if (run[0] != "SGD") CHECK(recorded.steps_of(0).item<float>() == step + 1);
      for (const auto& one : {recorded.fused, ordinary.fused}) {
        auto& options = one->param_groups()[0].options();
        options.set_lr(options.get_lr() * 0.9);
        if (step != 8) continue;
        // What the kernels take by value.
        if (auto* sgd = dynamic_cast<torch::optim::SGDOptions*>(&options)) sgd->weight_decay(0.03);
        if (auto* adam = dynamic_cast<torch::optim::AdamOptions*>(&options)) adam->eps(1e-6);
        if (auto* adam = dynamic_cast<torch::optim::AdamWOptions*>(&options)) adam->eps(1e-6);
        if (auto* ada = dynamic_cast<torch::optim::AdagradOptions*>(&options)) ada->lr_decay(0.1);
      }
    }
    load_optimizer_state_dict(*recorded.fused, optimizer_state_dict(*recorded.fused));
    const bool has_state = run[0] != "SGD" || run[1].contains("momentum");
    if (has_state) CHECK_FALSE(upload_options(*recorded.fused));
    CHECK(upload_options(*recorded.fused));
  }
}

TEST_CASE("a step that is recorded too early says why", "[optim][gpu]") {
  if (no_gpu()) return;
  const Twins twins("AdamW", Json::object());
  twins.set_gradients();
  std::vector<at::Tensor> kept;
  const RecordingScope recording(kept);
  CHECK_THROWS_WITH(fused_step(*twins.fused), "no learning rate was uploaded");
  upload_options(*twins.fused);
  CHECK_THROWS_WITH(fused_step(*twins.fused), "a parameter takes its first step");
}
