#include "callbacks/meter.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "lightning/errors.h"
#include "lightning/python_text.h"
#include "lightning/terminal.h"

namespace lightning {
namespace {

constexpr size_t kMetricWidth = 5;

template <class... Args>
std::string print(const char* format, Args... args) {
  char text[64];
  std::snprintf(text, sizeof(text), format, args...);
  return text;
}

// "%.3g" with one digit of the exponent where one does: "1e-05" -> "1e-5"; `exact` where that is
// not longer.
std::string brief(double value, const std::string& exact) {
  std::string text = print("%.3g", value);
  const auto exponent = text.find('e');
  if (exponent != std::string::npos && text[exponent + 2] == '0') text.erase(exponent + 2, 1);
  return text.size() < exact.size() ? text : exact;
}

bool total_is_known(const Meter& meter) {
  return meter.total && *meter.total > 0 && meter.n <= *meter.total;
}

std::string prefix(const Meter& meter) {
  return meter.description.empty() ? "" : meter.description + ": ";
}

std::string percentage(const Meter& meter) {
  const double share = static_cast<double>(meter.n) / static_cast<double>(*meter.total);
  return print("%3.0f%%", share * 100);
}

// "3/4 [00:00<00:00, 93.54it/s, tl=0.141]"
std::string counts(const Meter& meter, const std::string& postfix) {
  const double rate = meter.rate();
  // A total that was passed was wrong.
  const bool passed = meter.total && *meter.total > 0 && meter.n > *meter.total;
  std::string out = std::to_string(meter.n) + "/";
  out += meter.total && !passed ? std::to_string(*meter.total) : "?";
  out += " [" + format_interval(meter.elapsed) + "<";
  out += rate == 0 ? "?" : format_interval(meter.remaining().value_or(0));
  out += ", " + (rate == 0 ? "?" : print("%5.2f", rate)) + "it/s";
  return out + (postfix.empty() ? "" : ", " + postfix) + "]";
}

// `width` cells, filled in eighths.
std::string blocks(double share, int width) {
  static const char* const eighths[] = {" ", "▏", "▎", "▍", "▌", "▋", "▊", "▉"};
  const auto filled = static_cast<int>(share * width * 8);
  std::string out = repeat("█", filled / 8);
  if (filled / 8 < width) out += eighths[filled % 8] + repeat(" ", width - filled / 8 - 1);
  return out;
}

}  // namespace

double Meter::rate() const { return elapsed > 0 ? static_cast<double>(n - initial) / elapsed : 0; }

std::optional<double> Meter::remaining() const {
  if (!total_is_known(*this) || rate() == 0) return std::nullopt;
  return static_cast<double>(*total - n) / rate();
}

std::string format_interval(double seconds) {
  const long long all = std::llabs(static_cast<long long>(seconds));
  const char* sign = seconds <= -1 ? "-" : "";
  if (all < 3600) return print("%s%02lld:%02lld", sign, all / 60, all % 60);
  return print("%s%lld:%02lld:%02lld", sign, all / 3600, all / 60 % 60, all % 60);
}

std::string format_meter(const Meter& meter, const std::string& postfix, int width) {
  const bool known = total_is_known(meter);
  const std::string left = prefix(meter) + (known ? percentage(meter) : "") + "|";
  const std::string right = "| " + counts(meter, postfix);
  const int room =
      width == 0 ? 10 : std::max(1, width - display_width(left) - display_width(right));
  const double share = known ? static_cast<double>(meter.n) / static_cast<double>(*meter.total) : 0;
  const std::string out = left + blocks(share, room) + right;
  return width == 0 ? out : trim_to_width(out, width);
}

std::string format_meter_line(const Meter& meter, const std::string& postfix) {
  return prefix(meter) + (total_is_known(meter) ? percentage(meter) + " " : "") +
         counts(meter, postfix);
}

std::string format_metric(double value) {
  const std::string exact = python_repr(value);
  if (!std::isfinite(value)) return exact;
  std::string text = brief(value, exact);
  if (text.find('e') != std::string::npos) return text;
  if (text.find('.') == std::string::npos && text.size() < kMetricWidth) text += '.';
  if (text.size() < kMetricWidth) text.append(kMetricWidth - text.size(), '0');
  return text;
}

std::string format_postfix(const ProgressMetrics& metrics) {
  std::vector<std::string> parts;
  for (const auto& [name, value] : metrics) {
    std::string text;
    if (const auto* number = std::get_if<double>(&value)) {
      text = format_metric(*number);
    } else if (const auto* whole = std::get_if<int64_t>(&value)) {
      text = brief(static_cast<double>(*whole), std::to_string(*whole));
    } else {
      text = std::get<std::string>(value);
    }
    parts.push_back(name + "=" + text);
  }
  return join(parts);
}

}  // namespace lightning
