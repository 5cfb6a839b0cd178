#include <torch/types.h>

#include <catch2/catch.hpp>
#include <chrono>
#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>

#include "lightning/metrics/accuracy.h"
#include "lightning/metrics/auroc.h"
#include "lightning/metrics/confusion_matrix.h"
#include "lightning/metrics/f1_score.h"
#include "lightning/metrics/mean.h"
#include "lightning/metrics/mean_squared_error.h"
#include "lightning/metrics/r2_score.h"
#include "tests/support/python.h"

using namespace lightning;
using Catch::Matchers::Contains;

namespace {

std::string read_file(const std::string& path) {
  std::ifstream in(path);
  REQUIRE(in.good());
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

template <class M, class O>
std::unique_ptr<Metric> make(const Json& options) {
  O parsed;
  parsed.read(options, "metric");
  return std::make_unique<M>(parsed);
}

std::unique_ptr<Metric> make(const std::string& name, const Json& options) {
  if (name == "Mean") return make<Mean, MeanOptions>(options);
  if (name == "Accuracy") return make<Accuracy, AccuracyOptions>(options);
  if (name == "F1Score") return make<F1Score, F1ScoreOptions>(options);
  if (name == "AUROC") return make<AUROC, AUROCOptions>(options);
  if (name == "R2Score") return make<R2Score, R2ScoreOptions>(options);
  if (name == "ConfusionMatrix") return make<ConfusionMatrix, ConfusionMatrixOptions>(options);
  if (name == "MeanSquaredError") return make<MeanSquaredError, MeanSquaredErrorOptions>(options);
  return make<MeanAbsoluteError, MeanAbsoluteErrorOptions>(options);
}

at::Tensor decode(const Json& in) {
  if (in.is_null()) return {};
  const auto shape = in["shape"].get<std::vector<int64_t>>();
  if (in["type"] == "int") {
    return torch::tensor(in["data"].get<std::vector<int64_t>>(), at::kLong).view(shape);
  }
  std::vector<double> data;
  for (const auto& value : in["data"]) {
    data.push_back(value.is_null() ? std::nan("") : value.get<double>());
  }
  return torch::tensor(data, at::kDouble).to(at::kFloat).view(shape);
}

// Shapes too: torchmetrics gives a scalar where there is one value.
bool same(const at::Tensor& ours, const at::Tensor& theirs) {
  return ours.sizes() == theirs.sizes() && ours.is_floating_point() == theirs.is_floating_point() &&
         at::allclose(ours.to(at::kDouble), theirs.to(at::kDouble), 1e-5, 1e-6, /*equal_nan=*/true);
}

// Two processes in one: what the second one gives to each collective is noted, then the first one
// meets it there.
class Recording : public Collectives {
 public:
  int64_t world_size() const override { return 2; }
  at::Tensor reduce(const at::Tensor& tensor, ReduceOp) override { return note(tensor); }
  at::Tensor all_gather_rows(const at::Tensor& tensor) override { return note(tensor); }
  std::vector<at::Tensor> given;

 private:
  at::Tensor note(const at::Tensor& tensor) { return given.emplace_back(tensor.clone()); }
};

class Meeting : public Collectives {
 public:
  explicit Meeting(std::vector<at::Tensor> other) : other_(std::move(other)) {}
  int64_t world_size() const override { return 2; }
  at::Tensor reduce(const at::Tensor& tensor, ReduceOp op) override {
    const at::Tensor& other = other_.at(next_++);
    return op == ReduceOp::kSum   ? tensor.add_(other)  // in place, as NCCL does
           : op == ReduceOp::kMin ? at::minimum(tensor, other)
                                  : at::maximum(tensor, other);
  }
  at::Tensor all_gather_rows(const at::Tensor& tensor) override {
    return at::cat({tensor, other_.at(next_++)});
  }

 private:
  std::vector<at::Tensor> other_;
  size_t next_ = 0;
};

at::Tensor synced(Metric& first, Metric& second) {
  Recording recording;
  try {
    second.compute_synced(recording);
  } catch (const std::exception&) {
    // On half of the data; what it gave is noted.
  }
  Meeting meeting(recording.given);
  return first.compute_synced(meeting);
}

class Extremes : public Metric {
 public:
  Extremes() {
    add_state("least", at::full({}, 1e9), Reduction::kMin);
    add_state("most", at::full({}, -1e9), Reduction::kMax);
  }
  void update(const at::Tensor& values, const at::Tensor&) override {
    if (values.numel() > 3) throw std::runtime_error("too many");
    state(0) = at::minimum(state(0), values.min());
    state(1) = at::maximum(state(1), values.max());
  }
  at::Tensor compute() const override { return at::stack({state(0), state(1)}); }
};

}  // namespace

TEST_CASE("metrics equal torchmetrics, by batch, over batches and over two ranks", "[metrics]") {
  const auto cases =
      Json::parse(testing::run_python(read_file("tests/metrics/torchmetrics_cases.py")));
  REQUIRE(cases.size() > 200);
  for (const auto& one : cases) {
    const std::string name = one["metric"];
    INFO(name << " " << one["options"].dump());
    const auto metric = make(name, one["options"]);
    const std::unique_ptr<Metric> ranks[] = {make(name, one["options"]),
                                             make(name, one["options"])};
    for (size_t i = 0; i < one["batches"].size(); ++i) {
      const at::Tensor first = decode(one["batches"][i][0]);
      const at::Tensor second = decode(one["batches"][i][1]);
      const at::Tensor batch_value = metric->forward(first, second);
      INFO("batch " << i << " gave " << batch_value << ", expected "
                    << decode(one["batch_values"][i]));
      CHECK(same(batch_value, decode(one["batch_values"][i])));
      CHECK(metric->batch_value().is_same(batch_value));
      ranks[i % 2]->update(first, second);
    }
    const at::Tensor expected = decode(one["value"]);
    INFO("gave " << metric->compute() << ", expected " << expected);
    CHECK(same(metric->compute(), expected));
    const at::Tensor local = ranks[0]->compute();
    CHECK(same(synced(*ranks[0], *ranks[1]), expected));
    CHECK(at::equal(ranks[0]->compute(), local));  // local states stay

    const auto resumed = make(name, one["options"]);
    resumed->load_state_dict(metric->state_dict());
    CHECK(same(resumed->compute(), expected));
  }
}

TEST_CASE("a rank that saw no batch does not change the value over all ranks", "[metrics]") {
  const auto probs = torch::softmax(torch::randn({12, 3}), 1);
  const auto target = torch::randint(0, 3, {12}, at::kLong);
  const auto check = [&](auto first, auto second, const at::Tensor& a, const at::Tensor& b) {
    first.update(a, b);
    const at::Tensor expected = first.compute();
    CHECK(same(synced(first, second), expected));
    CHECK(same(synced(second, first), expected));
  };
  const auto accuracy = AccuracyOptions("multiclass").num_classes(3).average("macro");
  check(Accuracy(accuracy), Accuracy(accuracy), probs, target);
  const auto auroc = AUROCOptions("multiclass").num_classes(3);
  check(AUROC(auroc), AUROC(auroc), probs, target);
  const auto labels = AUROCOptions("multilabel").num_labels(3);
  check(AUROC(labels), AUROC(labels), probs, probs.gt(0.3).to(at::kLong));
  const auto r2 = R2ScoreOptions().num_outputs(3);
  check(R2Score(r2), R2Score(r2), probs, torch::rand({12, 3}));
}

TEST_CASE("a metric without data gives what its states say, and reset begins anew", "[metrics]") {
  Accuracy accuracy(AccuracyOptions("multiclass").num_classes(4));
  CHECK(accuracy.compute().item<float>() == 0);
  accuracy.update(torch::rand({0, 4}), torch::zeros({0}, at::kLong));
  CHECK(accuracy.compute().item<float>() == 0);
  const auto labels = torch::arange(4);
  accuracy.update(labels, labels);
  CHECK(accuracy.compute().item<float>() == 1);
  accuracy.reset();
  CHECK(accuracy.compute().item<float>() == 0);
  CHECK_FALSE(accuracy.batch_value().defined());

  CHECK(std::isnan(Mean().compute().item<float>()));
  CHECK(AUROC(AUROCOptions("binary")).compute().item<float>() == 0);

  R2Score r2;
  r2.update(torch::rand({1}), torch::rand({1}));
  CHECK(std::isnan(r2.compute().item<float>()));
}

TEST_CASE("minimum and maximum states merge, and a failed batch changes nothing", "[metrics]") {
  Extremes first;
  Extremes second;
  CHECK(at::equal(first(torch::tensor({3.0f, 5.0f})), torch::tensor({3.0f, 5.0f})));
  CHECK(at::equal(first(torch::tensor({4.0f})), torch::tensor({4.0f, 4.0f})));
  CHECK_THROWS_WITH(first(torch::ones({4})), "too many");
  CHECK(at::equal(first.compute(), torch::tensor({3.0f, 5.0f})));
  second.update(torch::tensor({-1.0f}), {});
  CHECK(at::equal(synced(first, second), torch::tensor({-1.0f, 5.0f})));
  Collectives alone;
  CHECK(at::equal(first.compute_synced(alone), torch::tensor({3.0f, 5.0f})));
}

TEST_CASE("a metric gathers in inference mode and outside of it", "[metrics]") {
  Mean mean;
  MeanSquaredError error;
  R2Score r2;
  const auto x = torch::arange(4, at::kFloat);
  {
    const c10::InferenceMode on;
    mean.forward(x);
    error.forward(x, x + 1);
    r2.update(x, x);
    mean.reset();
    mean.forward(x);
  }
  mean.forward(x + 4);
  error.update(x, x + 3);
  r2.update(x, x);
  mean.reset();
  mean.forward(x + 4);
  CHECK(mean.compute().item<float>() == 5.5f);
  CHECK(error.compute().item<float>() == 5);
  CHECK(r2.compute().item<float>() == 1);
}

TEST_CASE("states stay where they are in memory, so that a captured step finds them", "[metrics]") {
  Mean mean;
  mean.forward(torch::ones({3}));
  const auto at_start = mean.state_dict();
  struct Peek : Mean {
    const at::Tensor& sum() { return state(0); }
  } peek;
  const void* const memory = peek.sum().data_ptr();
  peek.forward(torch::ones({3}));
  peek.update(torch::ones({3}));
  peek.reset();
  peek.forward(torch::ones({3}));
  CHECK(peek.sum().data_ptr() == memory);
  mean.forward(torch::ones({3}));
  CHECK(at_start.at("mean_value").as_tensor().item<float>() == 3);  // a copy
}

TEST_CASE("metrics keep no view of a batch whose memory is used again", "[metrics]") {
  AUROC auroc(AUROCOptions("binary"));
  auto preds = torch::tensor({0.9f, 0.1f});
  auto target = torch::tensor({1, 0}, at::kLong);
  auroc.update(preds, target);
  preds.fill_(0.5);
  target.fill_(1);
  CHECK(auroc.compute().item<float>() == 1);
}

TEST_CASE("metrics refuse options that make no sense and say what to write", "[metrics]") {
  const auto accuracy = [](const AccuracyOptions& options) { Accuracy made(options); };
  CHECK_THROWS_WITH(accuracy(AccuracyOptions()), Contains("got no task"));
  CHECK_THROWS_WITH(accuracy(AccuracyOptions("multclass")), Contains("\"multiclass\""));
  CHECK_THROWS_WITH(accuracy(AccuracyOptions("multiclass")),
                    Contains("no num_classes") && Contains(".num_classes(10)"));
  CHECK_THROWS_WITH(accuracy(AccuracyOptions("multiclass").num_classes(1)),
                    Contains("num_classes 1"));
  CHECK_THROWS_WITH(accuracy(AccuracyOptions("binary").num_classes(2)), Contains("no use for it"));
  CHECK_THROWS_WITH(accuracy(AccuracyOptions("multiclass").num_classes(3).top_k(4)),
                    Contains("got top_k 4") && Contains("1 to num_classes, 3"));
  CHECK_THROWS_WITH(accuracy(AccuracyOptions("multilabel").num_labels(3).top_k(2)),
                    Contains("only the multiclass task"));
  CHECK_THROWS_WITH(accuracy(AccuracyOptions("multiclass").num_classes(3).average("marco")),
                    Contains("\"macro\""));
  CHECK_THROWS_WITH(accuracy(AccuracyOptions("binary").threshold(1.5)), Contains("threshold 1.5"));
  CHECK_THROWS_WITH(accuracy(AccuracyOptions("multiclass").num_classes(3).threshold(0.2)),
                    Contains("no use for it"));
  CHECK_THROWS_WITH(F1Score(F1ScoreOptions("binary").zero_division(0.5)),
                    Contains("zero_division 0.5"));
  CHECK_THROWS_WITH(ConfusionMatrix(ConfusionMatrixOptions("binary").normalize("rows")),
                    Contains("got normalize \"rows\""));
  CHECK_THROWS_WITH(AUROC(AUROCOptions("binary").max_fpr(0.0)), Contains("max_fpr 0"));
  CHECK_THROWS_WITH(AUROC(AUROCOptions("multiclass").num_classes(3).average("micro")),
                    Contains("got average \"micro\""));
  CHECK_THROWS_WITH(AUROC(AUROCOptions("binary").thresholds(int64_t{1})), Contains("thresholds 1"));
  CHECK_THROWS_WITH(R2Score(R2ScoreOptions().adjusted(-1)), Contains("adjusted -1"));
  CHECK_THROWS_WITH(MeanSquaredError(MeanSquaredErrorOptions().num_outputs(0)),
                    Contains("num_outputs 0"));
  CHECK_THROWS_WITH(Mean(MeanOptions().nan_strategy(std::string("warning"))),
                    Contains("got nan_strategy \"warning\""));
}

TEST_CASE("metrics refuse batches that do not fit and say with which shapes", "[metrics]") {
  Accuracy accuracy(AccuracyOptions("multiclass").num_classes(3).ignore_index(-1));
  const auto labels = torch::zeros({4}, at::kLong);
  CHECK_THROWS_WITH(accuracy.update(torch::rand({4, 5}), labels),
                    Contains("[4, 5]") && Contains("[N, 3, ...]"));
  CHECK_THROWS_WITH(accuracy.update(torch::rand({4, 3}), torch::full({4}, 7, at::kLong)),
                    Contains("from 7 to 7") && Contains("classes 0 to 2 or the ignore_index -1"));
  CHECK_THROWS_WITH(accuracy.update(torch::rand({4, 3}), torch::rand({4})), Contains("at::kLong"));
  CHECK_THROWS_WITH(accuracy.update(torch::rand({4}), labels), Contains("floating-point"));
  CHECK_THROWS_WITH(accuracy.update(torch::rand({4, 3}), at::Tensor()),
                    Contains("predictions and targets"));
  Accuracy best(AccuracyOptions("multiclass").num_classes(3).top_k(2));
  CHECK_THROWS_WITH(best.update(labels, labels), Contains("top_k 2"));
  Accuracy binary(AccuracyOptions("binary"));
  CHECK_THROWS_WITH(binary.update(torch::rand({4}), torch::rand({3})), Contains("[4]"));
  CHECK_THROWS_WITH(binary.update(torch::rand({4}), labels + 2), Contains("expected 0 or 1"));
  AUROC auroc(AUROCOptions("binary"));
  CHECK_THROWS_WITH(auroc.update(labels, labels), Contains("integers as predictions"));
  MeanSquaredError error;
  CHECK_THROWS_WITH(error.update(torch::rand({4, 1}), torch::rand({4})), Contains("[4, 1]"));
  Mean mean(MeanOptions().nan_strategy(std::string("error")));
  const auto nan = torch::full({2}, std::numeric_limits<double>::quiet_NaN());
  CHECK_THROWS_WITH(mean.update(nan), Contains("nan in 2 of 2"));
  CHECK_THROWS_WITH(mean.update(torch::rand({2}), torch::rand({3})), Contains("weights"));
}

TEST_CASE("a metric refuses the state of another and stays as it was", "[metrics]") {
  Mean mean;
  mean.update(torch::ones({2}));
  Accuracy accuracy(AccuracyOptions("binary"));
  CHECK_THROWS_AS(mean.load_state_dict(accuracy.state_dict()), CheckpointError);
  CHECK_THROWS_WITH(mean.load_state_dict(State::dict({{"weight", at::ones({})}})),
                    Contains("mean_value"));
  CHECK(mean.compute().item<float>() == 1);
}

TEST_CASE("metrics follow their input to the GPU and never wait for it", "[metrics][gpu]") {
  if (!at::hasCUDA()) {
    WARN("needs a GPU");
    return;
  }
  const auto target = torch::randint(0, 10, {256}, at::kLong);
  const auto preds = torch::randn({256, 10});
  const auto yes = torch::rand({256}).gt(0.4).to(at::kLong);
  struct Pair {
    std::unique_ptr<Metric> here, there;
    at::Tensor first, second;
  };
  std::vector<Pair> pairs;
  const auto add = [&](const char* name, const Json& options, const at::Tensor& first,
                       const at::Tensor& second) {
    pairs.push_back({make(name, options), make(name, options), first, second});
  };
  for (const char* average : {"micro", "macro"}) {
    for (const int top_k : {1, 3}) {
      add("Accuracy",
          {{"task", "multiclass"},
           {"num_classes", 10},
           {"average", average},
           {"top_k", top_k},
           {"ignore_index", 3}},
          preds, target);
    }
  }
  add("F1Score", {{"task", "binary"}, {"ignore_index", -1}}, preds.select(1, 0), yes);
  add("ConfusionMatrix", {{"task", "multiclass"}, {"num_classes", 10}, {"ignore_index", 3}}, preds,
      target);
  add("AUROC", {{"task", "multiclass"}, {"num_classes", 10}, {"ignore_index", 3}}, preds, target);
  add("AUROC", {{"task", "binary"}, {"thresholds", 20}}, preds.select(1, 0), yes);
  add("R2Score", Json::object(), preds, preds * 0.9);
  add("MeanSquaredError", Json::object(), preds, preds * 0.9);
  add("Mean", Json::object(), preds, preds.abs());
  std::vector<std::pair<at::Tensor, at::Tensor>> inputs;
  for (auto& pair : pairs) {
    inputs.emplace_back(pair.first.cuda(), pair.second.cuda());
    pair.here->update(pair.first, pair.second);
    pair.there->update(inputs.back().first, inputs.back().second);  // moves the states
  }

  const auto work = torch::randn({8192, 8192}, at::kCUDA);
  at::Tensor product = work.mm(work);
  product.sum().item<float>();
  const auto start = std::chrono::steady_clock::now();
  const auto seconds = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  for (int i = 0; i < 60; ++i) product = work.mm(work);
  for (size_t i = 0; i < pairs.size(); ++i) {
    pairs[i].there->update(inputs[i].first, inputs[i].second);
  }
  const double updates_done = seconds();
  product.sum().item<float>();
  INFO("updates took " << updates_done << " s of " << seconds() << " s");
  CHECK(updates_done < 0.5 * seconds());

  for (auto& pair : pairs) {
    pair.here->update(pair.first, pair.second);
    CHECK(pair.there->compute().is_cuda());
    CHECK(same(pair.there->compute().cpu(), pair.here->compute()));
  }
}
