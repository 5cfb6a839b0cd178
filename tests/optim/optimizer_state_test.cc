#include "lightning/optim/optimizer_state.h"

#include <ATen/ops/randn.h>
#include <torch/optim/adagrad.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/lbfgs.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>

#include <catch2/catch.hpp>

#include "lightning/optim/factories.h"
#include "lightning/optim/torch_optimizers.h"
#include "tests/optim/state_json.h"
#include "tests/support/python.h"

using namespace lightning;
using Catch::Matchers::Contains;
using testing::tensor_from;
using testing::to_json;

namespace {

using Params = std::vector<at::Tensor>;
using OptimizerPtr = std::shared_ptr<torch::optim::Optimizer>;

Params params_from(const Json& in) {
  Params params;
  for (const auto& one : in) params.push_back(tensor_from(one).requires_grad_());
  return params;
}

// As the script builds it: the first parameter in a group of its own where that is possible.
OptimizerPtr make(const std::string& name, const Json& config, const Params& params) {
  const auto factory = registry<OptimizerFactory>().make(name, config);
  if (name == "LBFGS" || name == "Adagrad") return factory->make(params);
  auto optimizer = factory->make({params.begin(), params.begin() + 1});
  torch::optim::OptimizerParamGroup rest({params.begin() + 1, params.end()});
  rest.set_options(optimizer->param_groups()[0].options().clone());
  optimizer->add_param_group(rest);
  return optimizer;
}

at::Tensor loss_of(const Params& params) {
  at::Tensor loss = torch::zeros({});
  for (size_t i = 0; i < 2; ++i) {
    loss = loss + (params[i] - static_cast<double>(i) - 1).square().sum() +
           params[i].pow(4).sum() / 10;
  }
  return loss;
}

void step(torch::optim::Optimizer& optimizer, Params& params, const Json& grads) {
  if (grads.is_null()) {
    optimizer.step([&] {
      const at::AutoGradMode on(true);
      optimizer.zero_grad();
      const at::Tensor loss = loss_of(params);
      loss.backward();
      return loss;
    });
    return;
  }
  for (size_t i = 0; i < grads.size(); ++i) params[i].mutable_grad() = tensor_from(grads[i]);
  optimizer.step();
}

Json grads_of(const Json& one, size_t i) {
  return one["name"] == "LBFGS" ? Json() : one["grads"][i];
}

Json to_json(const Params& params) {
  Json all = Json::array();
  for (const auto& param : params) all.push_back(testing::to_json(param.detach()));
  return all;
}

void check_matches(const Json& ours, const Json& theirs, double tolerance) {
  std::string where;
  const bool match = testing::matches(ours, theirs, tolerance, where);
  INFO("gave " << ours << "\nexpected " << theirs << "\nat " << where);
  CHECK(match);
}

const Json& reference() {
  static const Json cases =
      Json::parse(testing::run_python(testing::read_file("tests/optim/torch_optimizers.py")));
  return cases;
}

class Mine : public torch::optim::SGD {
 public:
  using torch::optim::SGD::SGD;
};

class Unknown : public torch::optim::Optimizer {
 public:
  explicit Unknown(Params params)
      : Optimizer(std::move(params), std::make_unique<torch::optim::SGDOptions>(0.1)) {}
  at::Tensor step(LossClosure) override { return {}; }
};

std::string error_of(torch::optim::Optimizer& optimizer, const State& state) {
  try {
    load_optimizer_state_dict(optimizer, state);
  } catch (const CheckpointError& error) {
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("the state of an optimizer has Python's keys, types and values", "[optim]") {
  for (const auto& one : reference()) {
    INFO(one["name"] << " " << one["config"]);
    // LibTorch's line search is another program than Python's.
    const double near = one["config"].contains("line_search_fn") ? 1e-2 : 1e-4;
    const size_t half = 4;
    auto params = params_from(one["start"]);
    const auto optimizer = make(one["name"], one["config"], params);
    for (size_t i = 0; i < half; ++i) step(*optimizer, params, grads_of(one, i));
    check_matches(to_json(params), one["half"]["params"], near);
    check_matches(to_json(optimizer_state_dict(*optimizer)), one["half"]["state"], 10 * near);

    // Python's first half, our second one.
    auto resumed_params = params_from(one["half"]["params"]);
    const auto resumed = make(one["name"], one["config"], resumed_params);
    load_optimizer_state_dict(*resumed, testing::state_from(one["half"]["state"]));
    for (size_t i = half; i < 2 * half; ++i) step(*resumed, resumed_params, grads_of(one, i));
    check_matches(to_json(resumed_params), one["end"], near);
  }
}

TEST_CASE("an optimizer that is saved and loaded goes on bit for bit", "[optim]") {
  for (const auto& one : reference()) {
    INFO(one["name"] << " " << one["config"]);
    auto params = params_from(one["start"]);
    const auto optimizer = make(one["name"], one["config"], params);
    for (size_t i = 0; i < 3; ++i) step(*optimizer, params, grads_of(one, i));
    optimizer->param_groups()[0].options().set_lr(0.0123);

    Params copies;
    for (const auto& param : params) copies.push_back(param.detach().clone().requires_grad_());
    const auto other = make(one["name"], one["config"], copies);
    load_optimizer_state_dict(*other, optimizer_state_dict(*optimizer));
    for (size_t i = 3; i < 8; ++i) {
      step(*optimizer, params, grads_of(one, i));
      step(*other, copies, grads_of(one, i));
    }
    for (size_t p = 0; p < params.size(); ++p) CHECK(at::equal(params[p], copies[p]));
    CHECK(to_json(optimizer_state_dict(*other)) == to_json(optimizer_state_dict(*optimizer)));
  }
}

TEST_CASE("a user's optimizer that derives from a known one is saved like it", "[optim]") {
  Params params = {torch::ones({2}).requires_grad_()};
  Mine mine(params, torch::optim::SGDOptions(0.1).momentum(0.9));
  params[0].mutable_grad() = torch::ones({2});
  mine.step();
  const State state = optimizer_state_dict(mine);
  CHECK(state.at("state").at(int64_t{0}).contains("momentum_buffer"));
  Mine other(params, torch::optim::SGDOptions(0.1).momentum(0.9));
  load_optimizer_state_dict(other, state);
  CHECK(to_json(optimizer_state_dict(other)) == to_json(state));

  Unknown unknown(params);
  CHECK_THROWS_WITH(optimizer_state_dict(unknown), Contains("Unknown") && Contains("AdamW"));
  CHECK_THROWS_AS(load_optimizer_state_dict(unknown, state), MisconfigurationError);
}

TEST_CASE("a state that does not fit is refused before anything is changed", "[optim]") {
  using torch::optim::AdamW;
  using torch::optim::AdamWOptions;
  Params params = {torch::ones({3, 2}).requires_grad_(), torch::ones({4}).requires_grad_()};
  AdamW adam(params, AdamWOptions(0.1));
  const Json untouched = to_json(optimizer_state_dict(adam));
  for (auto& param : params) param.mutable_grad() = torch::ones_like(param);
  AdamW source(params, AdamWOptions(0.2));
  source.step();
  const State good = optimizer_state_dict(source);

  State wrong_shape = good;
  wrong_shape["state"][int64_t{1}]["exp_avg"] = torch::ones({5});
  CHECK_THAT(error_of(adam, wrong_shape),
             Contains("parameter 1") && Contains("[5]") && Contains("[4]"));

  State missing = good;
  missing["state"][int64_t{0}].as_dict().erase("exp_avg_sq");
  CHECK_THAT(error_of(adam, missing), Contains("parameter 0 has no \"exp_avg_sq\""));

  State fewer = good;
  State group = good.at("param_groups").as_list()[0];
  group["params"] = State::List{int64_t{0}};
  fewer["param_groups"] = State::List{group};
  CHECK_THAT(error_of(adam, fewer), Contains("1 parameters, the optimizer's has 2"));

  State more_groups = good;
  more_groups["param_groups"] = State::List{group, group};
  CHECK_THAT(error_of(adam, more_groups), Contains("2 parameter groups, the optimizer has 1"));

  State maximizing = good;
  group = good.at("param_groups").as_list()[0];
  group["maximize"] = true;
  maximizing["param_groups"] = State::List{group};
  CHECK_THAT(error_of(adam, maximizing), Contains("maximize=True"));

  torch::optim::Adam other(params, torch::optim::AdamOptions(0.1));
  CHECK_THAT(error_of(other, good), Contains("decoupled_weight_decay=True"));
  torch::optim::Adagrad adagrad(params);
  CHECK_THAT(error_of(adagrad, optimizer_state_dict(torch::optim::SGD(params, 0.1))),
             Contains("Adagrad has a sum for each"));
  CHECK_THAT(error_of(adam, State::dict()), Contains("param_groups"));

  CHECK(to_json(optimizer_state_dict(adam)) == untouched);
  load_optimizer_state_dict(adam, good);
  CHECK(adam.param_groups()[0].options().get_lr() == 0.2);
}

TEST_CASE("moments are loaded in the type of their parameter and apart from the state", "[optim]") {
  Params params = {torch::ones({3}, at::kDouble).requires_grad_()};
  Params halves = {torch::ones({3}).requires_grad_()};
  torch::optim::Adam source(halves);
  halves[0].mutable_grad() = torch::ones({3});
  source.step();
  const State state = optimizer_state_dict(source);
  torch::optim::Adam adam(params);
  load_optimizer_state_dict(adam, state);
  const State loaded = optimizer_state_dict(adam);
  CHECK(loaded.at("state").at(int64_t{0}).at("exp_avg").as_tensor().scalar_type() == at::kDouble);
  CHECK(loaded.at("state").at(int64_t{0}).at("step").as_tensor().scalar_type() == at::kFloat);
  CHECK(loaded.at("state").at(int64_t{0}).at("step").as_tensor().dim() == 0);
  source.step();
  CHECK(loaded.at("state").at(int64_t{0}).at("exp_avg").as_tensor()[0].item<double>() ==
        Approx(0.1));
}

TEST_CASE("optimizers are made by name with Python's options and defaults", "[optim]") {
  const Params params = {torch::ones({2}).requires_grad_()};
  CHECK(registry<OptimizerFactory>().names() ==
        std::vector<std::string>{"Adagrad", "Adam", "AdamW", "LBFGS", "RMSprop", "SGD"});
  const Json config = {{"lr", 0.3}, {"betas", {0.8, 0.9}}, {"foreach", nullptr}, {"fused", true}};
  const auto adam = registry<OptimizerFactory>().make("AdamW", config)->make(params);
  const auto& options =
      static_cast<const torch::optim::AdamWOptions&>(adam->param_groups()[0].options());
  CHECK(options.lr() == 0.3);
  CHECK(options.betas() == std::make_tuple(0.8, 0.9));
  CHECK(options.weight_decay() == 0.01);
  const auto refused = [](const char* name, const Json& wrong) {
    try {
      registry<OptimizerFactory>().make(name, wrong, "optimizer");
    } catch (const MisconfigurationError& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  CHECK_THAT(refused("AdamW", {{"lr", -1}}), Contains("got lr -1"));
  CHECK_THAT(refused("AdamW", {{"beta", {0.1, 0.2}}}), Contains("betas"));
  CHECK_THAT(refused("Adam", {{"betas", {0.1, 1.2}}}), Contains("[0.1, 1.2]"));
  CHECK_THAT(refused("SGD", {{"maximize", true}}), Contains("maximize=true"));
  CHECK_THAT(refused("SGD", {{"nesterov", true}}), Contains("momentum 0"));
  CHECK_THAT(refused("LBFGS", {{"line_search_fn", "wolfe"}}), Contains("strong_wolfe"));
  CHECK_THAT(refused("AdmW", Json::object()), Contains("\"AdamW\""));
}
