// Takes what a run logs to a file or a service.
//
// Called on the thread that called fit(), on rank 0 only. An error in a logger ends the run: a
// training whose results are lost is not worth its time.
// Source: Lightning 2.6, `Logger`.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "lightning/fwd.h"
#include "lightning/options.h"

namespace lightning {

// Names and values of one row, in the order they were logged.
using MetricRow = std::vector<std::pair<std::string, double>>;

class Logger {
 public:
  static constexpr const char* kPartKind = "logger";

  virtual ~Logger() = default;

  virtual std::string name() const = 0;     // "lightning_logs"
  virtual std::string version() const = 0;  // "version_0"
  // The root folder of what it writes, and the folder of this run; empty for one without files.
  virtual std::string save_dir() const { return ""; }
  virtual std::string log_dir() const { return save_dir(); }
  virtual std::string group_separator() const { return "/"; }

  // Gives the trainer's default_root_dir to a logger that was given no folder of its own.
  virtual void set_default_root_dir(const std::string& /*dir*/) {}

  //   step   x-axis: optimizer steps counted from 0, see the reference's section 7.2
  virtual void log_metrics(const MetricRow& metrics, int64_t step) = 0;
  // The merged hyper-parameters of module and data module, a map; see `sanitize_hparams`.
  virtual void log_hyperparams(const Json& hparams) = 0;
  virtual void log_graph(LightningModule&) {}

  // Writes out what is buffered.
  virtual void save() {}
  // "success" or "failed".
  virtual void finalize(const std::string& /*status*/) { save(); }
  virtual void after_save_checkpoint(Callback& /*checkpoint*/) {}
};

}  // namespace lightning
