#include "callbacks/rich_progress_bar.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>

#include "lightning/errors.h"
#include "lightning/registry.h"
#include "lightning/trainer.h"

namespace lightning {
namespace {

const Registration<Callback> kRichProgressBar{
    "RichProgressBar", "A coloured bar for each epoch and evaluation, as rich draws it.",
    [](const RichProgressBarOptions& options) {
      return std::make_shared<RichProgressBar>(options);
    }};

constexpr int kBarWidth = 40;
constexpr int kLeastBarWidth = 10;
constexpr int kPulseWidth = 20;     // columns after which the pulse repeats
constexpr double kPulseSpeed = 15;  // columns a second

LiveProgressBar::Pace pace_of(const RichProgressBarOptions& options) {
  if (options.refresh_rate() < 0) {
    throw MisconfigurationError(str("RichProgressBar got refresh_rate ", options.refresh_rate(),
                                    ", expected drawings a second, or 0 for no bar."));
  }
  LiveProgressBar::Pace pace;
  pace.every_n = options.refresh_rate() == 0 ? 0 : 1;
  pace.interval = 1.0 / static_cast<double>(std::max<int64_t>(1, options.refresh_rate()));
  pace.leave = options.leave();
  return pace;
}

// ".3f" -> "%.3f". Other letters would make printf read something else than a double.
std::string checked_format(const std::string& format) {
  const auto digits = format.find_first_not_of("0123456789", format.find('.') == 0 ? 1 : 0);
  if (format.size() < 8 && digits + 1 == format.size() &&
      std::string("eEfFgG").find(format.back()) != std::string::npos) {
    return "%" + format;
  }
  throw MisconfigurationError(
      str("RichProgressBar got theme.metrics_format \"", format,
          "\", expected a precision and one of e, f and g, as in \".3f\"."));
}

// H:MM:SS, as Python prints a timedelta of whole seconds.
std::string clock_text(std::optional<double> seconds) {
  if (!seconds) return "-:--:--";
  const auto all = static_cast<long long>(*seconds);
  const long long days = all / 86400;
  char text[64];
  std::snprintf(text, sizeof(text), "%lld:%02lld:%02lld", all / 3600 % 24, all / 60 % 60, all % 60);
  return (days == 0 ? "" : str(days, days == 1 ? " day, " : " days, ")) + text;
}

std::string two_decimals(double value) {
  char text[64];
  std::snprintf(text, sizeof(text), "%.2f", value);
  return text;
}

}  // namespace

RichProgressBar::RichProgressBar(const RichProgressBarOptions& options)
    : LiveProgressBar(pace_of(options)), theme_(options.theme()) {
  const auto style = [](const std::string& definition, const char* name) {
    return Style::parse(definition, str("RichProgressBar's theme.", name));
  };
  styles_ = {style(theme_.description(), "description"),
             style(theme_.progress_bar(), "progress_bar"),
             style(theme_.progress_bar_finished(), "progress_bar_finished"),
             style(theme_.progress_bar_pulse(), "progress_bar_pulse"),
             style(theme_.batch_progress(), "batch_progress"),
             style(theme_.time(), "time"),
             style(theme_.processing_speed(), "processing_speed"),
             style(theme_.metrics(), "metrics")};
  theme_.metrics_format(checked_format(theme_.metrics_format()));
}

std::string RichProgressBar::epoch_name(int64_t epoch) const {
  const int64_t epochs = trainer().max_epochs();
  return epochs > 0 ? str("Epoch ", epoch, "/", epochs - 1) : str("Epoch ", epoch);
}

RichProgressBar::Row RichProgressBar::row_of(const Task& task) const {
  const Meter& meter = task.meter;
  // The rate of the last half minute; of the whole where there is no such.
  double rate = meter.rate();
  if (task.history.size() > 1) {
    const auto& [then, n] = task.history.front();
    if (meter.elapsed > then) rate = static_cast<double>(meter.n - n) / (meter.elapsed - then);
  }
  std::optional<double> remaining;
  if (meter.total && rate > 0) {
    const auto left = static_cast<double>(std::max<int64_t>(0, *meter.total - meter.n));
    remaining = std::ceil(left / rate);
  }
  return {&task, meter.description,
          str(meter.n, "/", meter.total ? std::to_string(*meter.total) : "--"),
          clock_text(meter.elapsed) + " • " + clock_text(remaining), two_decimals(rate) + "it/s"};
}

RichProgressBar::Layout RichProgressBar::layout_of(const std::vector<Row>& rows,
                                                   const std::string& metrics, int width) const {
  Layout layout;
  // As wide as the longest name that comes and goes, so that the bar stays where it is.
  layout.names = display_width(validation_description());
  for (const auto& row : rows) {
    layout.names = std::max(layout.names, display_width(row.description));
    layout.batches = std::max(layout.batches, display_width(row.batches));
    layout.times = std::max(layout.times, display_width(row.time));
    layout.speeds = std::max(layout.speeds, display_width(row.speed));
  }
  const int fixed = layout.names + layout.batches + layout.times + layout.speeds + 4;
  const int wanted = metrics.empty() ? 0 : 1 + display_width(metrics);
  layout.metrics_beside = fixed + kLeastBarWidth + wanted <= width;
  const int left = width - fixed - (layout.metrics_beside ? wanted : 0);
  layout.bar = std::max(1, std::min(kBarWidth, left));
  return layout;
}

std::string RichProgressBar::line_of(const Row& row, const Layout& layout, double now) const {
  const auto cell = [&](const std::string& text, int columns, const Style& style) {
    return style.paint(text, colors_) + repeat(" ", columns - display_width(text)) + " ";
  };
  return cell(row.description, layout.names, styles_.description) +
         bar(*row.task, layout.bar, now) + " " +
         cell(row.batches, layout.batches, styles_.batches) +
         cell(row.time, layout.times, styles_.time) + styles_.speed.paint(row.speed, colors_);
}

std::vector<std::string> RichProgressBar::render(const Frame& frame) const {
  const int width = frame.width == 0 ? 79 : frame.width;
  std::vector<Row> rows = {row_of(*frame.main)};
  if (frame.nested != nullptr) rows.push_back(row_of(*frame.nested));
  const std::string metrics = join(metric_texts(frame.metrics), theme_.metrics_text_delimiter());
  const Layout layout = layout_of(rows, metrics, width);

  std::vector<std::string> lines;
  for (const auto& row : rows) lines.push_back(line_of(row, layout, frame.now));
  std::vector<std::string> below;
  if (!layout.metrics_beside) {
    add_metrics(frame.metrics, width, below);
  } else if (!metrics.empty()) {
    const int gap = 1 + layout.speeds - display_width(rows[0].speed);
    lines[0] += repeat(" ", gap) + styles_.metrics.paint(metrics, colors_);
  }
  for (auto& line : lines) line = trim_to_width(line, width);
  lines.insert(lines.begin() + 1, below.begin(), below.end());
  return lines;
}

std::vector<std::string> RichProgressBar::metric_texts(const ProgressMetrics& metrics) const {
  std::vector<std::string> texts;
  for (const auto& [name, value] : metrics) {
    const auto* number = std::get_if<double>(&value);
    const auto* whole = std::get_if<int64_t>(&value);
    char text[400];
    if (number != nullptr || whole != nullptr) {
      std::snprintf(text, sizeof(text), theme_.metrics_format().c_str(),
                    number != nullptr ? *number : static_cast<double>(*whole));
    }
    texts.push_back(name + ": " +
                    (number || whole ? std::string(text) : std::get<std::string>(value)));
  }
  return texts;
}

// Below the bar, as many on a line as fit.
void RichProgressBar::add_metrics(const ProgressMetrics& metrics, int width,
                                  std::vector<std::string>& lines) const {
  const std::string& delimiter = theme_.metrics_text_delimiter();
  std::string line;
  const auto flush = [&] {
    if (!line.empty()) lines.push_back(styles_.metrics.paint(trim_to_width(line, width), colors_));
    line.clear();
  };
  for (const auto& text : metric_texts(metrics)) {
    if (display_width(line) + display_width(delimiter) + display_width(text) > width) flush();
    line += (line.empty() ? "" : delimiter) + text;
  }
  flush();
}

std::string RichProgressBar::bar(const Task& task, int width, double now) const {
  const Meter& meter = task.meter;
  if (!meter.total) return pulse(width, now);
  const bool done = meter.n >= *meter.total;
  const int64_t halves =
      done ? 2 * width : 2 * width * std::max<int64_t>(0, meter.n) / *meter.total;
  const int full = static_cast<int>(halves / 2);
  const bool half = halves % 2 == 1;
  const Style& style = done ? styles_.finished : styles_.bar;
  std::string out = style.paint(repeat("━", full) + (half ? "╸" : ""), colors_);
  int rest = width - full - (half ? 1 : 0);
  // Without colours what is to come could not be told from what is done.
  if (colors_ == ColorSystem::kNone) return out + repeat(" ", rest);
  static const Style back = Style::parse("grey23", "back");
  std::string remaining;
  if (!half && full > 0 && rest > 0) {
    remaining = "╺";
    --rest;
  }
  return out + back.paint(remaining + repeat("━", rest), colors_);
}

// A wave of light that moves along.
std::string RichProgressBar::pulse(int width, double now) const {
  if (colors_ == ColorSystem::kNone) return repeat("━", width);
  static const Style back = Style::parse("grey23", "back");
  const Color dark = *back.color();
  const Color light = styles_.pulse.color().value_or(dark);
  const auto offset = static_cast<int>(std::fmod(now * kPulseSpeed, kPulseWidth));
  std::string out;
  for (int i = 0; i < width; ++i) {
    const double phase =
        static_cast<double>((i - offset + kPulseWidth) % kPulseWidth) / kPulseWidth;
    const double share = 0.5 + std::cos(phase * 2 * 3.14159265358979) / 2;
    out += Style::of(blend(light, dark, share)).paint("━", colors_);
  }
  return out;
}

}  // namespace lightning
