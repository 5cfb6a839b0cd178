// Lengths of time as people write them: for Timer, max_time, val_check_interval and
// train_time_interval.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include <type_traits>
#include <variant>

namespace lightning {

// Seconds, with a fraction where the text or the map has one.
using Seconds = std::chrono::duration<double>;

// "DD:HH:MM:SS", or a map with weeks, days, hours, minutes, seconds, milliseconds, microseconds.
using Duration = std::variant<std::string, std::map<std::string, int64_t>>;

// `where` names the option in errors: "Timer.duration".
//
// Days take any number of digits, the others two; spaces around the text are fine.
// Errors: MisconfigurationError with the text given and the format expected; for a map, with the
// unit that is not known and its nearest matches, or with a sum below zero.
// Source: Lightning 2.6, `Timer.__init__`.
Seconds parse_duration(const std::string& text, const std::string& where);
Seconds parse_duration(const std::map<std::string, int64_t>& units, const std::string& where);
template <class D, std::enable_if_t<std::is_same<D, Duration>::value, int> = 0>
Seconds parse_duration(const D& duration, const std::string& where) {
  return std::visit([&](const auto& form) { return parse_duration(form, where); }, duration);
}

// As Python prints a timedelta: "1:30:00", "1 day, 0:00:05", "2 days, 0:00:00.250000".
std::string format_duration(Seconds duration);

// As Python's repr of a timedelta has it: "datetime.timedelta(days=1, seconds=5)".
std::string python_timedelta(Seconds duration);

// Seconds of a clock that never goes back; its zero means nothing.
double monotonic_seconds();

}  // namespace lightning
