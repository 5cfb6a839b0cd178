// A coloured bar, as rich draws it:
//
//   Epoch 0/4  ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╺━━━━━━━━━ 3/4 0:00:01 • 0:00:00 93.54it/s  tl: 0.141
//   Validation ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━ 2/2 0:00:00 • 0:00:00 310.09it/s
//
// Registered as "RichProgressBar". Silent on ranks other than 0; see live_progress_bar.h for when
// it draws. Where the line does not fit, the bar shrinks to ten columns, then metrics go below it.
// An endless fit shows no last epoch, where the original writes "/-2".
// Source: Lightning 2.6, `RichProgressBar`; rich 15.
#pragma once

#include <string>
#include <vector>

#include "callbacks/live_progress_bar.h"
#include "lightning/options.h"
#include "lightning/style.h"

namespace lightning {

// Styles are written as rich writes them, see lightning/style.h; empty for plain.
struct RichProgressBarTheme : Options<RichProgressBarTheme> {
  OPTION(std::string, description, "", "Style of \"Epoch 0/4\".");
  OPTION(std::string, progress_bar, "#6206E0", "Style of the part that is done.");
  OPTION(std::string, progress_bar_finished, "#6206E0", "Style of a bar that is all done.");
  OPTION(std::string, progress_bar_pulse, "#6206E0", "Style of a bar of unknown length.");
  OPTION(std::string, batch_progress, "", "Style of \"3/4\".");
  OPTION(std::string, time, "dim", "Style of the time taken and the time to go.");
  OPTION(std::string, processing_speed, "dim underline", "Style of \"93.54it/s\".");
  OPTION(std::string, metrics, "italic", "Style of the metrics.");
  OPTION(std::string, metrics_text_delimiter, " ", "What stands between two metrics.");
  OPTION(std::string, metrics_format, ".3f", "How numbers are printed: .3f, .2e or .4g.");
};

struct RichProgressBarOptions : Options<RichProgressBarOptions> {
  // The original's 100 would fetch the metrics from the device every hundredth of a second.
  OPTION(int64_t, refresh_rate, 10, "Most drawings a second; 0 for no bar.");
  OPTION(bool, leave, false, "Whether the bar of each epoch stays on the terminal.");
  OPTION(RichProgressBarTheme, theme, RichProgressBarTheme(), "Styles of the parts.");
};

class RichProgressBar : public LiveProgressBar {
 public:
  // Errors: MisconfigurationError for a negative refresh_rate, for a style with a word that is
  // none, for a metrics_format that is none.
  explicit RichProgressBar(const RichProgressBarOptions& options = {});

  // As the environment says if not set.
  void set_colors(ColorSystem colors) { colors_ = colors; }

 protected:
  std::vector<std::string> render(const Frame& frame) const override;
  std::string epoch_name(int64_t epoch) const override;
  std::string loader_name(const std::string& stage, int64_t) const override { return stage; }

 private:
  struct Styles {
    Style description, bar, finished, pulse, batches, time, speed, metrics;
  };
  // The cells of a row but for its bar, which takes what the others leave.
  struct Row {
    const Task* task;
    std::string description, batches, time, speed;
  };
  // Widths of the columns.
  struct Layout {
    int names = 0, bar = 0, batches = 0, times = 0, speeds = 0;
    bool metrics_beside = true;  // else they go below
  };

  Row row_of(const Task& task) const;
  Layout layout_of(const std::vector<Row>& rows, const std::string& metrics, int width) const;
  std::string line_of(const Row& row, const Layout& layout, double now) const;

  std::string bar(const Task& task, int width, double now) const;
  std::string pulse(int width, double now) const;
  std::vector<std::string> metric_texts(const ProgressMetrics& metrics) const;
  void add_metrics(const ProgressMetrics& metrics, int width,
                   std::vector<std::string>& lines) const;

  RichProgressBarTheme theme_;
  Styles styles_;
  ColorSystem colors_ = terminal_colors();
};

}  // namespace lightning
