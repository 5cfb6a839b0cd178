// How long each action of a run took.
// Source: Lightning 2.6, `SimpleProfiler`.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "lightning/options.h"
#include "lightning/profiler.h"

namespace lightning {

struct SimpleProfilerOptions : Options<SimpleProfilerOptions> {
  OPTION(std::optional<std::string>, dirpath, std::nullopt,
         "Folder of the report's file. null: the trainer's log_dir.");
  OPTION(
      std::optional<std::string>, filename, std::nullopt,
      "The report goes to the file STAGE-filename-RANK.txt, added to its end. null: to the log.");
  OPTION(bool, extended, true, "Whether calls and percentages are reported too.");
};

// Registered as "simple". Reports after each run, over all runs so far; rank 0 reports to the log,
// every rank to its file. Used on the thread that runs the trainer.
class SimpleProfiler : public Profiler {
 public:
  explicit SimpleProfiler(SimpleProfilerOptions options = {});

  void start(const std::string& action) override;
  void stop(const std::string& action) override;

  // The table: longest share first (by mean duration, where not extended).
  std::string summary() const override;

  void setup(Stage stage, int64_t rank, const std::string& log_dir) override;
  // Errors: std::runtime_error for a file that cannot be written.
  void describe() override;

  // Durations of an action in seconds, in order; empty for one that was never stopped.
  std::vector<double> durations(const std::string& action) const;

 private:
  using Clock = std::chrono::steady_clock;
  struct Action {
    std::string name;
    std::vector<double> seconds;
    std::optional<Clock::time_point> started;
  };
  struct Row {
    std::string action;
    double mean;
    size_t calls;
    double total;
    double percentage;
  };

  std::vector<Row> rows(double total) const;
  std::string file_name() const;

  SimpleProfilerOptions options_;
  Clock::time_point created_;
  std::vector<Action> actions_;  // in the order of their first start
  std::unordered_map<std::string, size_t> index_;
  std::optional<Stage> stage_;
  std::optional<int64_t> rank_;
};

}  // namespace lightning
