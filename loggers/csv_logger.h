// Writes metrics to `metrics.csv` and hyper-parameters to `hparams.yaml` in save_dir/name/version.
#pragma once

#include <cstdint>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "lightning/log_dir.h"
#include "lightning/logger.h"
#include "lightning/options.h"

namespace lightning {

struct CSVLoggerOptions : LogDirOptions<CSVLoggerOptions> {
  CSVLoggerOptions() = default;
  CSVLoggerOptions(std::string dir) { save_dir(std::move(dir)); }

  OPTION(std::string, prefix, "", "Put before every metric's name, with a \"-\".");
  OPTION(int64_t, flush_logs_every_n_steps, 100,
         "Steps between two writes of what was logged. At least 1.");
};

// The table has a column for each metric and for `step`, sorted by name, and a row for each call of
// log_metrics; a metric that a call lacks is an empty cell. Lines end in CR LF and numbers are
// Python's, so that a run's file equals the original's.
//
// log_metrics only keeps the numbers (0.2 µs for a row of four). They are written when
// (step + 1) divides by flush_logs_every_n_steps, by save(), by finalize() and at the end of the
// object's life; rows are added to the file, which is written anew only when a metric comes up for
// the first time, and then replaced at once. Rows that could not be written stay and are tried
// again by the next write.
//
// The first row, hyper-parameters or save() creates the folder; a metrics.csv that lies there from
// another run is deleted, with a warning.
//
// Called on rank 0 only, on one thread.
// Errors: MisconfigurationError for flush_logs_every_n_steps < 1 or a negative version;
// std::runtime_error with path and reason when a file cannot be written.
// Source: Lightning 2.6, `CSVLogger`.
class CSVLogger : public Logger {
 public:
  explicit CSVLogger(const CSVLoggerOptions& options = {});
  ~CSVLogger() override;

  std::string name() const override { return dir_.name(); }
  std::string version() const override { return dir_.version(); }
  std::string save_dir() const override { return dir_.save_dir(); }
  std::string log_dir() const override { return dir_.path(); }
  void set_default_root_dir(const std::string& dir) override { dir_.set_default_root(dir); }

  void log_metrics(const MetricRow& metrics, int64_t step) override;
  void log_hyperparams(const Json& hparams) override;
  void save() override;
  void finalize(const std::string& status) override;

 private:
  struct Column {
    std::string name;  // with the prefix
    bool whole;        // `epoch` and `step` are integers, as in the original
  };
  struct Cell {
    size_t column;
    double value;
  };

  void open();
  size_t column(const std::string& metric);
  size_t add_column(const std::string& name, bool whole);
  void flush();
  std::vector<size_t> sorted_columns() const;
  std::string header_line(const std::vector<size_t>& order) const;
  std::string pending_rows(const std::vector<size_t>& order) const;
  std::string written_rows(const std::vector<size_t>& order) const;

  CSVLoggerOptions options_;
  LogDir dir_;
  bool opened_ = false;
  std::string file_;
  std::shared_ptr<Json> hparams_;  // a pointer, so that json.hpp stays in sources

  std::vector<Column> columns_;  // in the order of their first row; 0 is `step`
  std::unordered_map<std::string, size_t> column_of_;  // by the metric's name, without prefix
  std::vector<size_t> order_;  // of the columns in the file; empty before the first write
  std::vector<Cell> cells_;    // of the rows that are not written yet
  std::vector<size_t> row_ends_;
};

}  // namespace lightning
