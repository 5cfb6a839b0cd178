// What the bars have in common: they follow a run from its hooks and draw, now and then, one bar
// with at most one below it: an epoch, and the validation within it.
//
// A batch costs a look at the clock (about 30 ns) and nothing more until the bar is due again: no
// text is built and no value is fetched from the device before. The last state of an epoch or an
// evaluation is always drawn. Each drawing is one write.
//
// Where the output is no terminal, a readable line is written every ten seconds and at the end of
// each epoch instead, so that a log file stays a log file.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "callbacks/progress_bar.h"
#include "lightning/terminal.h"

namespace lightning {

// How often it draws.
struct BarPace {
  int64_t every_n = 1;          // batches; 0 turns the bar off
  double interval = 0.1;        // least seconds between two drawings
  double line_interval = 10.0;  // least seconds between two lines, where it writes lines
  bool lines = false;           // writes lines even on a terminal
  bool leave = false;           // keeps the bar of each epoch
  int position = 0;             // lines below the cursor at which it draws
};

// One bar.
struct BarTask {
  Meter meter;
  std::chrono::steady_clock::time_point start;
  bool leave = true;
  bool finished = false;  // its last state was written
  // States at earlier drawings, at most half a minute back: for a rate of late.
  std::vector<std::pair<double, int64_t>> history;
};

class LiveProgressBar : public ProgressBar {
 public:
  using Clock = std::chrono::steady_clock;
  using Pace = BarPace;
  using Task = BarTask;

  ~LiveProgressBar() override;

  // Where it draws, before a run; stdout if not set.
  void set_output(std::shared_ptr<Output> output) { output_ = std::move(output); }

  bool is_enabled() const override { return ProgressBar::is_enabled() && pace_.every_n > 0; }
  void disable() override;

  // Prints above the bars. Warnings of the trainer pass here too while bars are shown.
  void print_line(const std::string& line) override;

  void on_sanity_check_start(Trainer&, LightningModule&) override;
  void on_sanity_check_end(Trainer&, LightningModule&) override;
  void on_train_start(Trainer&, LightningModule&) override;
  void on_train_epoch_start(Trainer&, LightningModule&) override;
  void on_train_batch_end(Trainer&, LightningModule&, const StepOutput&, const Batch&,
                          int64_t batch_idx) override;
  void on_train_epoch_end(Trainer&, LightningModule&) override;
  void on_train_end(Trainer&, LightningModule&) override;
  void on_validation_start(Trainer&, LightningModule&) override;
  void on_validation_batch_start(Trainer&, LightningModule&, const Batch&, int64_t batch_idx,
                                 int64_t dataloader_idx) override;
  void on_validation_batch_end(Trainer&, LightningModule&, const StepOutput&, const Batch&,
                               int64_t batch_idx, int64_t dataloader_idx) override;
  void on_validation_end(Trainer&, LightningModule&) override;
  void on_test_start(Trainer&, LightningModule&) override;
  void on_test_batch_start(Trainer&, LightningModule&, const Batch&, int64_t batch_idx,
                           int64_t dataloader_idx) override;
  void on_test_batch_end(Trainer&, LightningModule&, const StepOutput&, const Batch&,
                         int64_t batch_idx, int64_t dataloader_idx) override;
  void on_test_end(Trainer&, LightningModule&) override;
  void on_predict_start(Trainer&, LightningModule&) override;
  void on_predict_batch_start(Trainer&, LightningModule&, const Batch&, int64_t batch_idx,
                              int64_t dataloader_idx) override;
  void on_predict_batch_end(Trainer&, LightningModule&, const Batch&, const Batch&,
                            int64_t batch_idx, int64_t dataloader_idx) override;
  void on_predict_end(Trainer&, LightningModule&) override;
  void teardown(Trainer&, LightningModule&, Stage) override;
  // What stands on the screen stays there, and the terminal is left in order.
  void on_exception(Trainer&, LightningModule&, const std::exception&) override;

 protected:
  explicit LiveProgressBar(const Pace& pace) : pace_(pace) {}

  // What a drawing shows.
  struct Frame {
    const Task* main = nullptr;
    const Task* nested = nullptr;    // null where there is none
    const ProgressMetrics& metrics;  // of the main bar
    int width = 80;                  // columns it may take
    double now = 0;                  // seconds on some clock, for what moves by itself
  };

  // The lines of a drawing, each at most `width` columns.
  virtual std::vector<std::string> render(const Frame& frame) const = 0;
  // What bars are called in a run.
  virtual std::string epoch_name(int64_t epoch) const;
  virtual std::string loader_name(const std::string& stage, int64_t dataloader_idx) const;

 private:
  enum class Draw {
    kWhenDue,  // at its pace
    kSoon,     // at once, as long as such drawings stay a small part of the run's time
    kNow
  };

  void open(std::optional<Task>& task, const std::string& description, bool leave);
  void restart(Task& task, const std::string& description, std::optional<int64_t> total);
  void advance(std::optional<Task>& task, int64_t n, LightningModule* module = nullptr);
  void start_loader(std::optional<Task>& task, int64_t dataloader_idx, const std::string& stage,
                    std::optional<int64_t> (ProgressBar::*total)() const);
  void close(std::optional<Task>& task);
  std::optional<Task>& validation_task();

  // With a module, values are fetched first if it comes to drawing.
  void draw(Draw when, LightningModule* module = nullptr);
  bool is_due(Draw when, Clock::time_point now) const;
  void draw_bars(Clock::time_point now, LightningModule* module);
  void write_last_line(Task& task);
  std::string line_text(const Task& task) const;
  std::vector<std::string> render_lines(Clock::time_point now);
  // Escape sequences and text that bring these lines to the screen, in place of those there.
  std::string put_lines(std::vector<std::string> lines);
  std::string clear_lines();
  void set_clock(Task& task, Clock::time_point now) const;
  void catch_log_lines(bool on);
  void print_log_line(const std::string& line);
  bool shown() const { return is_enabled() && (main_ || nested_); }

  Pace pace_;
  std::shared_ptr<Output> output_ = standard_output();
  bool terminal_ = false;
  bool catching_ = false;
  bool epoch_is_fresh_ = false;
  std::optional<Task> main_;
  std::optional<Task> nested_;
  ProgressMetrics metrics_;
  Clock::time_point opened_at_;
  Clock::time_point due_at_;
  Clock::duration spent_{};  // on drawing, since it was opened

  // Of the screen, which other threads write to when they warn.
  std::mutex mutex_;
  std::vector<std::string> screen_;  // the lines that stand there
  int screen_columns_ = 0;           // of the terminal when they were drawn
};

}  // namespace lightning
