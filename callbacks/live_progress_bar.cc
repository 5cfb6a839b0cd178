#include "callbacks/live_progress_bar.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "lightning/errors.h"
#include "lightning/log.h"
#include "lightning/trainer.h"

namespace lightning {
namespace {

using Clock = LiveProgressBar::Clock;

constexpr double kHistorySeconds = 30;
// Drawings beyond the pace may take this share of a run, after a first allowance.
constexpr double kShareOfRun = 0.005;
constexpr double kAllowanceSeconds = 0.01;
// Between two drawings, this many times what one takes: a slow terminal does not hold up the run.
constexpr int kRestPerDrawing = 20;

double seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

Clock::duration duration_of(double seconds) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

std::string move_up(int lines) { return lines > 0 ? str("\x1b[", lines, "A\r") : "\r"; }

}  // namespace

LiveProgressBar::~LiveProgressBar() { catch_log_lines(false); }

// ---- Drawing ------------------------------------------------------------------------------------

bool LiveProgressBar::is_due(Draw when, Clock::time_point now) const {
  if (when == Draw::kNow || now >= due_at_) return true;
  return when == Draw::kSoon && terminal_ &&
         seconds(spent_) < kShareOfRun * seconds(now - opened_at_) + kAllowanceSeconds;
}

void LiveProgressBar::draw(Draw when, LightningModule* module) {
  if (!shown()) return;
  const auto now = Clock::now();
  if (is_due(when, now)) draw_bars(now, module);
}

void LiveProgressBar::draw_bars(Clock::time_point now, LightningModule* module) {
  if (module != nullptr) metrics_ = get_metrics(trainer(), *module);
  if (terminal_) {
    const auto lines = render_lines(now);
    const std::lock_guard<std::mutex> lock(mutex_);
    output_->write(put_lines(lines));
  } else {
    Task& task = nested_ ? *nested_ : *main_;
    set_clock(task, now);
    output_->write(line_text(task));
  }
  const auto took = Clock::now() - now;
  spent_ += took;
  const double interval = terminal_ ? pace_.interval : pace_.line_interval;
  due_at_ = now + std::max(duration_of(interval), kRestPerDrawing * took);
}

std::vector<std::string> LiveProgressBar::render_lines(Clock::time_point now) {
  for (auto* task : {&main_, &nested_}) {
    if (*task) set_clock(**task, now);
  }
  const int columns = output_->columns();
  // The last column stays free: a terminal may break the line after it.
  Frame frame{main_ ? &*main_ : &*nested_, main_ && nested_ ? &*nested_ : nullptr, metrics_,
              columns == 0 ? 0 : std::max(1, columns - 1), seconds(now.time_since_epoch())};
  auto lines = render(frame);
  const int rows = output_->rows() - pace_.position;
  if (rows > 0 && static_cast<int>(lines.size()) > rows) lines.resize(static_cast<size_t>(rows));
  return lines;
}

void LiveProgressBar::set_clock(Task& task, Clock::time_point now) const {
  task.meter.elapsed = seconds(now - task.start);
  auto& history = task.history;
  history.emplace_back(task.meter.elapsed, task.meter.n);
  const auto recent =
      std::find_if(history.begin(), history.end(), [&](const std::pair<double, int64_t>& state) {
        return state.first >= task.meter.elapsed - kHistorySeconds;
      });
  history.erase(history.begin(), recent);
}

// Between drawings the cursor rests at the left of the first line. A window that was made narrower
// breaks the lines in two, wherever the cursor is; from there all that follows can be cleared.
std::string LiveProgressBar::put_lines(std::vector<std::string> lines) {
  const int columns = output_->columns();
  std::string out;
  if (columns != screen_columns_) out += clear_lines();
  screen_columns_ = columns;
  const size_t count = std::max(lines.size(), screen_.size());
  out += repeat("\n", pace_.position) + "\r";
  for (size_t i = 0; i < count; ++i) {
    out += (i > 0 ? "\n\r" : "") + (i < lines.size() ? lines[i] : std::string()) + "\x1b[K";
  }
  out += move_up(pace_.position + std::max(0, static_cast<int>(count) - 1));
  screen_ = std::move(lines);
  return out;
}

std::string LiveProgressBar::clear_lines() {
  if (screen_.empty()) return "";
  const auto count = static_cast<int>(screen_.size());
  screen_.clear();
  // Lines of other programs may follow where this one does not draw at the cursor.
  if (pace_.position == 0) return "\r\x1b[J";
  std::string out = repeat("\n", pace_.position) + "\r\x1b[K";
  for (int i = 1; i < count; ++i) out += "\n\x1b[K";
  return out + move_up(pace_.position + count - 1);
}

std::string LiveProgressBar::line_text(const Task& task) const {
  const bool nested = nested_ && &task == &*nested_;
  return format_meter_line(task.meter, nested ? "" : format_postfix(metrics_)) + "\n";
}

void LiveProgressBar::write_last_line(Task& task) {
  if (task.finished) return;
  set_clock(task, Clock::now());
  output_->write(line_text(task));
  task.finished = true;
  due_at_ = Clock::now() + duration_of(pace_.line_interval);
}

// ---- Lines of others ----------------------------------------------------------------------------

void LiveProgressBar::print_line(const std::string& line) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto lines = screen_;
  const std::string above = clear_lines() + line + "\n";
  output_->write(lines.empty() ? above : above + put_lines(lines));
}

void LiveProgressBar::catch_log_lines(bool on) {
  if (on == catching_) return;
  if (!on) {
    set_log_sink({});
    catching_ = false;
    return;
  }
  const auto other = set_log_sink([this](const std::string& line) { print_log_line(line); });
  catching_ = !other;
  if (other) set_log_sink(other);  // whoever takes the lines already keeps them
}

void LiveProgressBar::print_log_line(const std::string& line) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto lines = screen_;
  const bool torn = !lines.empty() && isatty(STDERR_FILENO) == 1;
  if (torn) output_->write(clear_lines());
  std::fprintf(stderr, "%s\n", line.c_str());
  if (torn) output_->write(put_lines(lines));
}

void LiveProgressBar::disable() {
  if (shown() && terminal_) {
    const std::lock_guard<std::mutex> lock(mutex_);
    output_->write(clear_lines());
  }
  catch_log_lines(false);
  ProgressBar::disable();
}

// ---- Bars ---------------------------------------------------------------------------------------

void LiveProgressBar::open(std::optional<Task>& task, const std::string& description, bool leave) {
  const bool first = &task == &main_;
  if (first && main_) close(main_);
  task.emplace();
  task->leave = leave;
  restart(*task, description, std::nullopt);
  if (!first || !is_enabled()) return;
  terminal_ = output_->is_terminal() && !pace_.lines;
  metrics_.clear();
  spent_ = {};
  opened_at_ = task->start;
  due_at_ = opened_at_ + duration_of(terminal_ ? 0 : pace_.line_interval);
  if (terminal_) catch_log_lines(true);
}

void LiveProgressBar::restart(Task& task, const std::string& description,
                              std::optional<int64_t> total) {
  task.meter = Meter();
  task.meter.description = description;
  task.meter.total = total;
  task.start = Clock::now();
  task.finished = false;
  task.history.clear();
}

void LiveProgressBar::advance(std::optional<Task>& task, int64_t n, LightningModule* module) {
  if (!task || !is_enabled()) return;
  Meter& meter = task->meter;
  meter.n = n;
  const bool last = meter.total == n;
  if (n % pace_.every_n != 0 && !last) return;
  const auto now = Clock::now();
  if (is_due(last ? Draw::kSoon : Draw::kWhenDue, now)) draw_bars(now, module);
}

void LiveProgressBar::start_loader(std::optional<Task>& task, int64_t dataloader_idx,
                                   const std::string& stage,
                                   std::optional<int64_t> (ProgressBar::*total)() const) {
  if (!has_dataloader_changed(dataloader_idx) || !task) return;
  if (shown() && !terminal_ && task->leave && task->meter.n > 0) write_last_line(*task);
  restart(*task, loader_name(stage, dataloader_idx), (this->*total)());
  draw(Draw::kSoon);
}

void LiveProgressBar::close(std::optional<Task>& task) {
  if (!task) return;
  if (&task == &nested_) return nested_.reset();  // the next drawing clears its line
  nested_.reset();
  if (is_enabled() && !terminal_ && task->leave) write_last_line(*task);
  if (is_enabled() && terminal_) {
    const auto lines = task->leave ? render_lines(Clock::now()) : std::vector<std::string>();
    const std::lock_guard<std::mutex> lock(mutex_);
    std::string out = clear_lines();
    for (const auto& line : lines) out += line + "\n";
    output_->write(out);
  }
  catch_log_lines(false);
  task.reset();
}

std::string LiveProgressBar::epoch_name(int64_t epoch) const { return str("Epoch ", epoch); }

std::string LiveProgressBar::loader_name(const std::string& stage, int64_t dataloader_idx) const {
  return str(stage, " DataLoader ", dataloader_idx);
}

// ---- Hooks --------------------------------------------------------------------------------------

void LiveProgressBar::on_sanity_check_start(Trainer&, LightningModule&) {
  open(main_, sanity_check_description(), /*leave=*/false);
  draw(Draw::kSoon);
}

void LiveProgressBar::on_sanity_check_end(Trainer&, LightningModule&) { close(main_); }

void LiveProgressBar::on_train_start(Trainer&, LightningModule&) {
  open(main_, train_description(), /*leave=*/true);
  draw(Draw::kSoon);
}

void LiveProgressBar::on_train_epoch_start(Trainer& trainer, LightningModule&) {
  if (!main_) open(main_, train_description(), /*leave=*/true);  // the last epoch's bar was left
  restart(*main_, epoch_name(trainer.current_epoch()), total_train_batches());
  epoch_is_fresh_ = true;
  draw(Draw::kSoon);
}

void LiveProgressBar::on_train_batch_end(Trainer&, LightningModule& module, const StepOutput&,
                                         const Batch&, int64_t batch_idx) {
  if (epoch_is_fresh_ && main_) {
    main_->meter.initial = batch_idx;  // of an epoch that was resumed in its middle
    epoch_is_fresh_ = false;
  }
  advance(main_, batch_idx + 1, &module);
}

void LiveProgressBar::on_train_epoch_end(Trainer& trainer, LightningModule& module) {
  if (!shown() || !main_) return;
  if (terminal_) {
    draw(Draw::kNow, &module);
  } else {
    metrics_ = get_metrics(trainer, module);
    write_last_line(*main_);
  }
  if (pace_.leave) close(main_);
}

void LiveProgressBar::on_train_end(Trainer&, LightningModule&) { close(main_); }

std::optional<LiveProgressBar::Task>& LiveProgressBar::validation_task() {
  return trainer().state_fn() == Stage::kFit && !trainer().sanity_checking() ? nested_ : main_;
}

void LiveProgressBar::on_validation_start(Trainer& trainer, LightningModule&) {
  if (trainer.sanity_checking()) return;
  auto& task = validation_task();
  open(task, validation_description(), /*leave=*/&task == &main_);
  draw(Draw::kSoon);
}

void LiveProgressBar::on_validation_batch_start(Trainer& trainer, LightningModule&, const Batch&,
                                                int64_t, int64_t dataloader_idx) {
  start_loader(validation_task(), dataloader_idx,
               trainer.sanity_checking() ? sanity_check_description() : validation_description(),
               &ProgressBar::total_val_batches_current_dataloader);
}

void LiveProgressBar::on_validation_batch_end(Trainer&, LightningModule&, const StepOutput&,
                                              const Batch&, int64_t batch_idx, int64_t) {
  advance(validation_task(), batch_idx + 1);
}

void LiveProgressBar::on_validation_end(Trainer& trainer, LightningModule& module) {
  reset_dataloader_idx_tracker();
  if (trainer.sanity_checking()) return;
  const bool nested = &validation_task() == &nested_;
  close(validation_task());
  if (nested) draw(Draw::kSoon, &module);
}

void LiveProgressBar::on_test_start(Trainer&, LightningModule&) {
  open(main_, test_description(), /*leave=*/true);
  draw(Draw::kSoon);
}

void LiveProgressBar::on_test_batch_start(Trainer&, LightningModule&, const Batch&, int64_t,
                                          int64_t dataloader_idx) {
  start_loader(main_, dataloader_idx, test_description(),
               &ProgressBar::total_test_batches_current_dataloader);
}

void LiveProgressBar::on_test_batch_end(Trainer&, LightningModule&, const StepOutput&, const Batch&,
                                        int64_t batch_idx, int64_t) {
  advance(main_, batch_idx + 1);
}

void LiveProgressBar::on_test_end(Trainer&, LightningModule&) {
  reset_dataloader_idx_tracker();
  close(main_);
}

void LiveProgressBar::on_predict_start(Trainer&, LightningModule&) {
  open(main_, predict_description(), /*leave=*/true);
  draw(Draw::kSoon);
}

void LiveProgressBar::on_predict_batch_start(Trainer&, LightningModule&, const Batch&, int64_t,
                                             int64_t dataloader_idx) {
  start_loader(main_, dataloader_idx, predict_description(),
               &ProgressBar::total_predict_batches_current_dataloader);
}

void LiveProgressBar::on_predict_batch_end(Trainer&, LightningModule&, const Batch&, const Batch&,
                                           int64_t batch_idx, int64_t) {
  advance(main_, batch_idx + 1);
}

void LiveProgressBar::on_predict_end(Trainer&, LightningModule&) {
  reset_dataloader_idx_tracker();
  close(main_);
}

void LiveProgressBar::teardown(Trainer&, LightningModule&, Stage) { close(main_); }

void LiveProgressBar::on_exception(Trainer&, LightningModule&, const std::exception&) {
  reset_dataloader_idx_tracker();
  if (main_) main_->leave = true;
  close(main_);
}

}  // namespace lightning
