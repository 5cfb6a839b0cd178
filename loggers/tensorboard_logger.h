// Writes metrics, hyper-parameters, texts, histograms, images and graphs for TensorBoard.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "lightning/fwd.h"
#include "lightning/log_dir.h"
#include "lightning/logger.h"
#include "lightning/options.h"
#include "loggers/event_writer.h"

namespace lightning {

struct TensorBoardLoggerOptions : LogDirOptions<TensorBoardLoggerOptions> {
  TensorBoardLoggerOptions() = default;
  TensorBoardLoggerOptions(std::string dir) { save_dir(std::move(dir)); }

  OPTION(bool, log_graph, false,
         "Whether the graph of the model's forward on its example_input_array is written.");
  OPTION(bool, default_hp_metric, true,
         "Writes the scalar hp_metric = -1 with hyper-parameters that come without metrics; "
         "without one the hparams tab has no row for the run.");
  OPTION(std::string, prefix, "", "Put before every metric's name, with a \"-\".");
  OPTION(std::optional<std::string>, sub_dir, std::nullopt,
         "Folder of the event files within the version's.");
  OPTION(int64_t, max_queue, 10, "Events that may wait before they are written. At least 1.");
  OPTION(double, flush_secs, 120.0, "Seconds that an event may wait. More than 0.");
  OPTION(std::string, filename_suffix, "", "At the end of the event files' names.");
};

// Event files lie in save_dir/name/version[/sub_dir], which the first write creates; hparams.yaml
// is written beside them by save(), once.
//
// log_metrics encodes its row into a buffer (0.2 to 0.3 µs a number); a thread of EventWriter
// writes that out. save() and finalize() write what is left, and so does the end of the object's
// life. After finalize() a next write opens a next event file in the same folder.
//
// Called on rank 0 only; the add_ functions may be called from hooks of the module or a callback.
// Steps are the x-axis, as for log_metrics.
// Errors: MisconfigurationError for max_queue < 1, flush_secs <= 0, a negative version, and values
// that cannot be shown; std::runtime_error with path and reason when a file cannot be written.
// Source: Lightning 2.6, `TensorBoardLogger`; torch 2.11, `SummaryWriter`.
class TensorBoardLogger : public Logger {
 public:
  explicit TensorBoardLogger(const TensorBoardLoggerOptions& options = {});
  ~TensorBoardLogger() override;

  std::string name() const override { return dir_.name(); }
  std::string version() const override { return dir_.version(); }
  std::string save_dir() const override { return dir_.save_dir(); }
  std::string log_dir() const override;
  void set_default_root_dir(const std::string& dir) override { dir_.set_default_root(dir); }

  void log_metrics(const MetricRow& metrics, int64_t step) override;
  // For the hparams tab, flattened and sanitised, with hp_metric where that is the default; all
  // calls together, as they are, for hparams.yaml.
  void log_hyperparams(const Json& hparams) override;
  // With the metrics by which the hparams tab compares runs; they are logged, too.
  void log_hyperparams(const Json& hparams, const MetricRow& metrics, int64_t step = 0);
  // Does nothing unless the option log_graph is set. Warns where there is no example_input_array.
  void log_graph(LightningModule& module) override;
  void save() override;
  void finalize(const std::string& status) override;

  // ---- What SummaryWriter writes ----------------------------------------------------------------

  void add_scalar(const std::string& tag, double value, int64_t step);
  // Curves of one chart: each has an event file of its own, in log_dir/<main_tag>_<name>.
  void add_scalars(const std::string& main_tag, const MetricRow& values, int64_t step);
  // Markdown.
  void add_text(const std::string& tag, const std::string& text, int64_t step = 0);
  //   values     any shape, dtype and device
  //   edges      of the bins, ascending; none: TensorBoard's exponential ones
  //   max_bins   neighbouring bins are joined where there are more; 0: never
  void add_histogram(const std::string& tag, const at::Tensor& values, int64_t step,
                     const std::vector<double>& edges = {}, int64_t max_bins = 0);
  //   image   uint8 in 0 to 255 or another dtype in 0 to 1; `dataformats` names its dims: CHW, HWC,
  //           HW, or NCHW for a grid. 1, 3 or 4 channels
  void add_image(const std::string& tag, const at::Tensor& image, int64_t step,
                 const std::string& dataformats = "CHW");
  // A row of the hparams tab in a folder of its own, log_dir/run_name (the time where it is empty).
  //   discrete_domain   the values that some of the hyper-parameters may take, {name: [values]}
  void add_hparams(const Json& hparams, const MetricRow& metrics, const std::string& run_name = "",
                   int64_t step = 0);
  void add_hparams(const Json& hparams, const MetricRow& metrics, const Json& discrete_domain,
                   const std::string& run_name = "", int64_t step = 0);

 private:
  EventWriter& writer();
  std::unique_ptr<EventWriter> open(const std::string& folder) const;
  const std::string& tag_of(const std::string& metric);
  void close();

  TensorBoardLoggerOptions options_;
  LogDir dir_;
  std::shared_ptr<Json> hparams_;  // a pointer, so that json.hpp stays in sources
  std::unique_ptr<EventWriter> writer_;
  std::map<std::string, std::unique_ptr<EventWriter>> chart_writers_;  // of add_scalars, by folder
  std::string tag_;
};

}  // namespace lightning
