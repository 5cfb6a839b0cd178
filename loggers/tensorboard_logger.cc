#include "loggers/tensorboard_logger.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "lightning/files.h"
#include "lightning/hparams.h"
#include "lightning/registry.h"
#include "loggers/graph.h"
#include "loggers/summaries.h"

namespace lightning {
namespace {

const Registration<Logger> kTensorBoard{
    "TensorBoardLogger",
    "Writes TensorBoard's event files and hparams.yaml to save_dir/name/version.",
    [](const TensorBoardLoggerOptions& options) {
      return std::make_shared<TensorBoardLogger>(options);
    }};

const Json kNoDomain = nullptr;

std::vector<std::string> names(const MetricRow& metrics, const std::string& prefix = "") {
  std::vector<std::string> out;
  for (const auto& metric : metrics) out.push_back(prefix + metric.first);
  return out;
}

}  // namespace

TensorBoardLogger::TensorBoardLogger(const TensorBoardLoggerOptions& options)
    : options_(options),
      dir_(options.save_dir(), options.name(), options.version()),
      hparams_(std::make_shared<Json>(Json::object())) {
  if (options_.max_queue() < 1) {
    throw MisconfigurationError(str("TensorBoardLogger got max_queue ", options_.max_queue(),
                                    ", expected at least 1, which writes every event at once."));
  }
  if (!(options_.flush_secs() > 0)) {
    throw MisconfigurationError(str("TensorBoardLogger got flush_secs ", options_.flush_secs(),
                                    ", expected more than 0; for every event at once give "
                                    "max_queue 1."));
  }
}

TensorBoardLogger::~TensorBoardLogger() = default;

std::string TensorBoardLogger::log_dir() const {
  const std::filesystem::path version = dir_.path();
  return options_.sub_dir() ? (version / expand_path(*options_.sub_dir())).string()
                            : version.string();
}

std::unique_ptr<EventWriter> TensorBoardLogger::open(const std::string& folder) const {
  return std::make_unique<EventWriter>(folder, options_.max_queue(), options_.flush_secs(),
                                       options_.filename_suffix());
}

EventWriter& TensorBoardLogger::writer() {
  if (writer_ == nullptr) {
    dir_.create();
    writer_ = open(log_dir());
  }
  return *writer_;
}

const std::string& TensorBoardLogger::tag_of(const std::string& metric) {
  if (options_.prefix().empty()) return metric;
  tag_.assign(options_.prefix()).append("-").append(metric);
  return tag_;
}

void TensorBoardLogger::log_metrics(const MetricRow& metrics, int64_t step) {
  EventWriter& to = writer();
  const double now = wall_time();
  for (const auto& [name, value] : metrics) {
    to.add_scalar(tag_of(name), static_cast<float>(value), step, now);
  }
}

void TensorBoardLogger::log_hyperparams(const Json& hparams) {
  MetricRow metrics;
  if (options_.default_hp_metric()) metrics.emplace_back("hp_metric", -1);
  log_hyperparams(hparams, metrics);
}

void TensorBoardLogger::log_hyperparams(const Json& hparams, const MetricRow& metrics,
                                        int64_t step) {
  for (const auto& [key, value] : hparams.items()) (*hparams_)[key] = value;
  if (metrics.empty()) return;
  // The tags that the hparams tab looks for are those of the scalars, prefix and all; the original
  // leaves the prefix out and shows no value.
  const std::string prefix = options_.prefix().empty() ? "" : options_.prefix() + "-";
  const auto messages =
      summaries::hparams(sanitize_hparams(hparams), names(metrics, prefix), kNoDomain);
  log_metrics(metrics, step);
  for (const auto& message : messages) writer().add_summary(message, step, wall_time());
}

void TensorBoardLogger::log_graph(LightningModule& module) {
  if (!options_.log_graph()) return;
  const auto graph = traced_graph(module);
  if (!graph.empty()) writer().add_graph(graph, wall_time());
}

void TensorBoardLogger::save() {
  writer().flush();
  for (auto& [folder, writer] : chart_writers_) writer->flush();
  const std::string file = log_dir() + "/hparams.yaml";
  if (!std::filesystem::exists(file)) save_hparams_to_yaml(file, *hparams_);
}

void TensorBoardLogger::finalize(const std::string& status) {
  if (writer_ == nullptr) return;
  if (status == "success") save();
  close();
}

void TensorBoardLogger::close() {
  for (auto& [folder, writer] : chart_writers_) writer->close();
  chart_writers_.clear();
  writer_->close();
  writer_.reset();
}

void TensorBoardLogger::add_scalar(const std::string& tag, double value, int64_t step) {
  writer().add_scalar(tag, static_cast<float>(value), step, wall_time());
}

void TensorBoardLogger::add_scalars(const std::string& main_tag, const MetricRow& values,
                                    int64_t step) {
  std::string chart = main_tag;
  std::replace(chart.begin(), chart.end(), '/', '_');
  const double now = wall_time();
  for (const auto& [name, value] : values) {
    const std::string folder = writer().folder() + "/" + chart + "_" + name;
    auto& curve = chart_writers_[folder];
    if (curve == nullptr) curve = open(folder);
    curve->add_scalar(main_tag, static_cast<float>(value), step, now);
  }
}

void TensorBoardLogger::add_text(const std::string& tag, const std::string& text, int64_t step) {
  writer().add_summary(summaries::text(tag, text), step, wall_time());
}

void TensorBoardLogger::add_histogram(const std::string& tag, const at::Tensor& values,
                                      int64_t step, const std::vector<double>& edges,
                                      int64_t max_bins) {
  const auto histogram = summaries::make_histogram(
      values, edges.empty() ? summaries::default_bins() : edges, max_bins);
  writer().add_summary(summaries::histogram(tag, histogram), step, wall_time());
}

void TensorBoardLogger::add_image(const std::string& tag, const at::Tensor& image, int64_t step,
                                  const std::string& dataformats) {
  writer().add_summary(summaries::image(tag, image, dataformats), step, wall_time());
}

void TensorBoardLogger::add_hparams(const Json& hparams, const MetricRow& metrics,
                                    const std::string& run_name, int64_t step) {
  add_hparams(hparams, metrics, kNoDomain, run_name, step);
}

void TensorBoardLogger::add_hparams(const Json& hparams, const MetricRow& metrics,
                                    const Json& discrete_domain, const std::string& run_name,
                                    int64_t step) {
  const auto messages = summaries::hparams(hparams, names(metrics), discrete_domain);
  char time[32];
  std::snprintf(time, sizeof(time), "%.7f", wall_time());
  const auto run = open(writer().folder() + "/" + (run_name.empty() ? time : run_name));
  for (const auto& message : messages) run->add_summary(message, step, wall_time());
  for (const auto& [name, value] : metrics) {
    run->add_scalar(name, static_cast<float>(value), step, wall_time());
  }
  run->close();
}

}  // namespace lightning
