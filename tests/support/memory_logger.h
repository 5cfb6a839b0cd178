// A logger that keeps what it gets, for a test to look at.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "lightning/logger.h"

namespace lightning::testing {

class MemoryLogger : public Logger {
 public:
  std::string name() const override { return "memory"; }
  std::string version() const override { return "version_0"; }
  std::string save_dir() const override { return dir_; }
  void set_default_root_dir(const std::string& dir) override { dir_ = dir; }
  void log_metrics(const MetricRow& metrics, int64_t step) override {
    rows.emplace_back(step, metrics);
  }
  void log_hyperparams(const Json& given) override { hparams = given; }
  void after_save_checkpoint(Callback&) override { ++checkpoints; }
  void finalize(const std::string& with) override { status = with; }

  // Step and value of each row that has this metric.
  std::vector<std::pair<int64_t, double>> of(const std::string& metric) const {
    std::vector<std::pair<int64_t, double>> found;
    for (const auto& [step, row] : rows) {
      for (const auto& [name, value] : row) {
        if (name == metric) found.emplace_back(step, value);
      }
    }
    return found;
  }

  std::vector<std::pair<int64_t, MetricRow>> rows;
  Json hparams;
  int64_t checkpoints = 0;
  std::string status;

 private:
  std::string dir_;
};

}  // namespace lightning::testing
