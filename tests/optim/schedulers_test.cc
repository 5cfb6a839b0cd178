#include "lightning/optim/schedulers.h"

#include <torch/optim/adagrad.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/schedulers/step_lr.h>
#include <torch/optim/sgd.h>

#include <catch2/catch.hpp>

#include "lightning/optim/optimizer_state.h"
#include "lightning/optim/torch_optimizers.h"
#include "tests/optim/state_json.h"
#include "tests/support/python.h"

using namespace lightning;
using Catch::Matchers::Contains;

namespace {

using OptimizerPtr = std::shared_ptr<torch::optim::Optimizer>;

template <class O, class OptionsType>
OptimizerPtr two_groups(OptionsType options) {
  std::vector<torch::optim::OptimizerParamGroup> groups;
  for (const double lr : {0.1, 0.037}) {
    auto own = std::make_unique<OptionsType>(options);
    own->lr(lr);
    groups.emplace_back(std::vector<at::Tensor>{torch::ones({1}).requires_grad_()}, std::move(own));
  }
  return std::make_shared<O>(groups, options);
}

OptimizerPtr make_optimizer(const std::string& name) {
  using namespace torch::optim;
  if (name == "SGD") return two_groups<SGD>(SGDOptions(0.1).momentum(0.9));
  if (name == "Adam") return two_groups<Adam>(AdamOptions(0.1));
  if (name == "AdamW") return two_groups<AdamW>(AdamWOptions(0.1));
  if (name == "RMSprop") return two_groups<RMSprop>(RMSpropOptions(0.1));
  return two_groups<Adagrad>(AdagradOptions(0.1));
}

std::shared_ptr<LRScheduler> make_schedule(const Json& one, const OptimizerPtr& optimizer) {
  if (one["name"] == "LambdaLR") {
    return std::make_shared<LambdaLR>(
        optimizer, std::vector<LambdaLR::Lambda>{
                       [](int64_t epoch) { return std::pow(0.95, epoch); },
                       [](int64_t epoch) { return 1.0 / static_cast<double>(1 + epoch); }});
  }
  if (one["name"] == "MultiplicativeLR") {
    return std::make_shared<MultiplicativeLR>(
        optimizer, [](int64_t epoch) { return 0.95 + 0.0001 * static_cast<double>(epoch); });
  }
  Part<LRSchedulerFactory> part;
  part.read(one["schedule"], "lr_scheduler");
  return part.make("lr_scheduler")->make(optimizer);
}

std::vector<double> lrs(const torch::optim::Optimizer& optimizer) {
  std::vector<double> all;
  for (const auto& group : optimizer.param_groups()) all.push_back(group.options().get_lr());
  return all;
}

// The optimizer's groups under Python's keys, but for the numbers of their parameters.
Json groups_of(const torch::optim::Optimizer& optimizer) {
  Json groups = testing::to_json(optimizer_state_dict(optimizer).at("param_groups"));
  for (auto& group : groups) group.erase("params");
  return groups;
}

double momentum(const Json& group) {
  if (group.contains("betas")) return group["betas"][0];
  return group.contains("momentum") ? group["momentum"].get<double>() : 0.0;
}

void check_step(const Json& one, size_t step, const OptimizerPtr& optimizer,
                const LRScheduler& schedule) {
  const Json groups = groups_of(*optimizer);
  CHECK(schedule.get_last_lr() == lrs(*optimizer));
  for (size_t g = 0; g < groups.size(); ++g) {
    const double expected = one["lrs"][step][g];
    const double expected_momentum = one["momenta"][step][g];
    INFO("step " << step << ", group " << g);
    CHECK(lrs(*optimizer)[g] == expected);
    CHECK(momentum(groups[g]) == expected_momentum);
  }
}

OptimizerPtr sgd(double lr = 0.1) {
  return std::make_shared<torch::optim::SGD>(
      std::vector<at::Tensor>{torch::ones({1}).requires_grad_()}, torch::optim::SGDOptions(lr));
}

}  // namespace

TEST_CASE("schedules equal torch's over 200 steps, and resume from its states", "[optim]") {
  const auto reference =
      Json::parse(testing::run_python(testing::read_file("tests/optim/torch_schedules.py")));
  const size_t saved_at = reference["saved_at"];
  for (const auto& one : reference["cases"]) {
    INFO(one["name"]);
    const auto optimizer = make_optimizer(one["optimizer"]);
    const auto schedule = make_schedule(one, optimizer);
    OptimizerPtr resumed_optimizer;
    std::shared_ptr<LRScheduler> resumed;
    for (size_t step = 0; step < one["lrs"].size(); ++step) {
      const double metric = step == 0 ? 0 : reference["metrics"][step - 1].get<double>();
      if (step > 0) schedule->step(metric);
      check_step(one, step, optimizer, *schedule);
      if (resumed) {
        resumed->step(metric);
        check_step(one, step, resumed_optimizer, *resumed);
      }
      if (step != saved_at) continue;

      std::string where;
      const Json state = testing::to_json(schedule->state_dict());
      const bool states_match = testing::matches(state, one["saved"]["state"], 1e-12, where);
      INFO("state " << state << "\nexpected " << one["saved"]["state"] << "\nat " << where);
      CHECK(states_match);
      const Json groups = groups_of(*optimizer);
      const bool groups_match = testing::matches(groups, one["saved"]["groups"], 1e-12, where);
      INFO("groups " << groups << "\nexpected " << one["saved"]["groups"] << "\nat " << where);
      CHECK(groups_match);

      resumed_optimizer = make_optimizer(one["optimizer"]);
      resumed = make_schedule(one, resumed_optimizer);
      resumed->load_state_dict(testing::state_from(one["saved"]["state"]));
      State saved = optimizer_state_dict(*resumed_optimizer);
      State::List with_params;
      for (size_t g = 0; g < 2; ++g) {
        with_params.push_back(testing::state_from(one["saved"]["groups"][g]));
        with_params.back()["params"] = State::List{static_cast<int64_t>(g)};
      }
      saved["param_groups"] = with_params;
      load_optimizer_state_dict(*resumed_optimizer, saved);
    }
  }
}

TEST_CASE("every schedule that is registered is compared with torch's", "[optim]") {
  const auto script = testing::read_file("tests/optim/torch_schedules.py");
  for (const auto& name : registry<LRSchedulerFactory>().names()) {
    INFO(name);
    CHECK(script.find('"' + name + '"') != std::string::npos);
  }
}

TEST_CASE("schedules are made by reference or shared, and by typed options", "[optim]") {
  const auto shared = std::make_shared<torch::optim::AdamW>(
      std::vector<at::Tensor>{torch::ones({1}).requires_grad_()}, 0.1);
  StepLR by_reference(*shared, StepLROptions(1).gamma(0.5));
  by_reference.step();
  CHECK(by_reference.get_last_lr() == std::vector<double>{0.05});
  CHECK(&by_reference.optimizer() == shared.get());

  const auto warmup =
      std::make_shared<WarmupLR>(shared, WarmupLROptions(2).after(ExponentialLROptions(0.5)));
  std::vector<double> seen;
  for (int i = 0; i < 4; ++i, warmup->step()) seen.push_back(warmup->get_last_lr()[0]);
  CHECK(seen == std::vector<double>{0.05, 0.1 * 0.75, 0.1, 0.05});  // of the initial rate, 0.1
}

TEST_CASE("a schedule made later starts from the rate that the first one found", "[optim]") {
  const auto optimizer = sgd(0.2);
  const auto first = std::make_shared<ConstantLR>(optimizer, ConstantLROptions().factor(0.5));
  CHECK(lrs(*optimizer)[0] == 0.1);
  LambdaLR second(optimizer, [](int64_t) { return 1.0; });
  CHECK(lrs(*optimizer)[0] == 0.2);
  CHECK(testing::to_json(optimizer_state_dict(*optimizer))["param_groups"][0]["initial_lr"] == 0.2);
}

TEST_CASE("what schedules noted for an optimizer is gone with them", "[optim]") {
  const auto optimizer = sgd(0.2);
  std::make_shared<ConstantLR>(optimizer, ConstantLROptions().factor(0.5));
  CHECK_FALSE(
      optimizer_state_dict(*optimizer).at("param_groups").as_list()[0].contains("initial_lr"));
}

TEST_CASE("a schedule of LibTorch's own steps and resumes", "[optim]") {
  const auto run = [](int steps, const State* state) {
    auto optimizer = sgd(1.0);
    TorchLRScheduler schedule(optimizer,
                              std::make_shared<torch::optim::StepLR>(*optimizer, 3, 0.5));
    if (state != nullptr) {
      schedule.load_state_dict(*state);
      optimizer->param_groups()[0].options().set_lr(
          schedule.state_dict().at("last_epoch").as_int() >= 4 ? 0.5 : 1.0);
    }
    for (int i = 0; i < steps; ++i) schedule.step();
    return std::make_pair(schedule.state_dict(), schedule.get_last_lr()[0]);
  };
  const auto part = run(5, nullptr);
  CHECK(part.second == 0.5);
  CHECK(part.first.at("last_epoch").as_int() == 5);
  CHECK(run(5, &part.first).second == run(10, nullptr).second);
}

TEST_CASE("schedules refuse options that make no sense and say what to write", "[optim]") {
  const auto optimizer = sgd();
  const auto two = make_optimizer("SGD");
  CHECK_THROWS_WITH(StepLR(optimizer, StepLROptions()),
                    Contains("no step_size") && Contains("StepLROptions(30)"));
  CHECK_THROWS_WITH(StepLR(optimizer, StepLROptions(-1)), Contains("step_size -1"));
  CHECK_THROWS_WITH(ExponentialLR(optimizer, ExponentialLROptions()), Contains("no gamma"));
  CHECK_THROWS_WITH(LinearLR(optimizer, LinearLROptions().start_factor(0)),
                    Contains("start_factor 0"));
  CHECK_THROWS_WITH(CosineAnnealingLR(optimizer, {}), Contains("no T_max"));
  CHECK_THROWS_WITH(OneCycleLR(optimizer, OneCycleLROptions(0.1)), Contains("total_steps(n)"));
  CHECK_THROWS_WITH(
      OneCycleLR(optimizer, OneCycleLROptions(0.1).total_steps(9).anneal_strategy("cosine")),
      Contains("\"cosine\""));
  CHECK_THROWS_WITH(OneCycleLR(two, OneCycleLROptions().max_lr({1, 2, 3}).total_steps(9)),
                    Contains("3 values of max_lr") && Contains("2 parameter groups"));
  CHECK_THROWS_WITH(OneCycleLR(make_optimizer("Adagrad"), OneCycleLROptions(0.1).total_steps(9)),
                    Contains("cycle_momentum(false)"));
  CHECK_THROWS_WITH(ReduceLROnPlateau(optimizer, ReduceLROnPlateauOptions().factor(1)),
                    Contains("factor 1"));
  CHECK_THROWS_WITH(ReduceLROnPlateau(optimizer).step(), Contains("set_monitor"));
  CHECK_THROWS_WITH(WarmupLR(optimizer, WarmupLROptions()), Contains("warmup_steps 0"));
  CHECK_THROWS_WITH(StepLR(OptimizerPtr(), StepLROptions(1)), Contains("null"));
  CHECK_THROWS_WITH(StepLR(sgd(), StepLROptions(1).last_epoch(3)), Contains("load_state_dict()"));
  CHECK_THROWS_WITH(registry<LRSchedulerFactory>().make("StepLR"), Contains("no step_size"));
  CHECK_THROWS_WITH(registry<LRSchedulerFactory>().make("CosineAnealingLR"),
                    Contains("\"CosineAnnealingLR\""));

  const auto step = std::make_shared<StepLR>(optimizer, StepLROptions(1));
  const auto plateau = std::make_shared<ReduceLROnPlateau>(optimizer);
  using List = std::vector<std::shared_ptr<LRScheduler>>;
  CHECK_THROWS_WITH(SequentialLR(optimizer, List{step, step}, {}), Contains("0 milestones"));
  CHECK_THROWS_WITH(SequentialLR(optimizer, List{step, plateau}, {3}), Contains("place 1"));
  CHECK_THROWS_WITH(SequentialLR(two, List{step}, {}), Contains("another optimizer"));
  CHECK_THROWS_WITH(ChainedScheduler(optimizer, List{}), Contains("no schedules"));
}

TEST_CASE("OneCycleLR refuses a step beyond its last", "[optim]") {
  OneCycleLR schedule(sgd(), OneCycleLROptions(0.1).total_steps(10).cycle_momentum(false));
  CHECK(schedule.counts_steps());
  for (int i = 0; i < 10; ++i) schedule.step();
  CHECK_THROWS_WITH(schedule.step(), Contains("stepped 11 times") && Contains("10 steps"));
}

TEST_CASE("a schedule refuses a state of other groups and stays as it was", "[optim]") {
  StepLR one(sgd(), StepLROptions(5));
  StepLR two(make_optimizer("SGD"), StepLROptions(7));
  two.step();
  CHECK_THROWS_WITH(one.load_state_dict(two.state_dict()), Contains("2 parameter groups"));
  CHECK(one.last_epoch() == 0);
  CHECK(one.state_dict().at("step_size").as_int() == 5);
  State torn = one.state_dict();
  torn["gamma"] = "much";
  CHECK_THROWS_AS(one.load_state_dict(torn), CheckpointError);
  CHECK(one.state_dict().at("gamma").as_double() == 0.1);
}
