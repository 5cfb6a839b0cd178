#include "lightning/duration.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <vector>

#include "lightning/errors.h"

namespace lightning {
namespace {

constexpr int64_t kMicrosecondsPerDay = 86400LL * 1000000;

// `Timer got duration` of "Timer.duration".
std::string subject(const std::string& where) {
  const auto dot = where.rfind('.');
  return dot == std::string::npos ? where + " got"
                                  : where.substr(0, dot) + " got " + where.substr(dot + 1);
}

std::string strip(const std::string& text) {
  const char* const spaces = " \t\n\r\f\v";
  const auto begin = text.find_first_not_of(spaces);
  if (begin == std::string::npos) return "";
  return text.substr(begin, text.find_last_not_of(spaces) - begin + 1);
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts{""};
  for (const char c : text) {
    if (c == ':') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

bool is_number(const std::string& word) {
  return !word.empty() && word.size() <= 9 &&
         std::all_of(word.begin(), word.end(), [](char c) { return c >= '0' && c <= '9'; });
}

// What the text would be with the fields and digits it lacks; empty where that is not clear.
std::string completed(std::vector<std::string> parts) {
  if (parts.size() < 3 || parts.size() > 4 || !std::all_of(parts.begin(), parts.end(), is_number)) {
    return "";
  }
  if (parts.size() == 3) parts.insert(parts.begin(), "00");
  for (auto& part : parts) {
    if (part.size() < 2) part.insert(0, "0");
  }
  for (size_t i = 1; i < parts.size(); ++i) {
    if (parts[i].size() != 2) return "";
  }
  return join(parts, ":");
}

[[noreturn]] void refuse(const std::string& text, const std::vector<std::string>& parts,
                         const std::string& where) {
  const std::string better = completed(parts);
  throw MisconfigurationError(str(subject(where), " \"", text, "\", expected DD:HH:MM:SS. ",
                                  better.empty() ? "For an hour and a half write \"00:01:30:00\"."
                                                 : "Did you mean \"" + better + "\"?"));
}

const std::vector<std::pair<std::string, int64_t>>& units_in_microseconds() {
  static const std::vector<std::pair<std::string, int64_t>> units = {
      {"weeks", 7 * kMicrosecondsPerDay},
      {"days", kMicrosecondsPerDay},
      {"hours", 3600LL * 1000000},
      {"minutes", 60LL * 1000000},
      {"seconds", 1000000},
      {"milliseconds", 1000},
      {"microseconds", 1}};
  return units;
}

// Days, seconds and microseconds as a timedelta keeps them.
struct Parts {
  int64_t days, seconds, microseconds;
};

Parts parts_of(Seconds duration) {
  const auto all = static_cast<int64_t>(std::llround(duration.count() * 1e6));
  const int64_t days = all / kMicrosecondsPerDay;
  const int64_t rest = all % kMicrosecondsPerDay;
  return {days, rest / 1000000, rest % 1000000};
}

}  // namespace

Seconds parse_duration(const std::string& text, const std::string& where) {
  const auto parts = split(strip(text));
  const bool fits = parts.size() == 4 && std::all_of(parts.begin(), parts.end(), is_number) &&
                    std::all_of(parts.begin() + 1, parts.end(),
                                [](const std::string& part) { return part.size() == 2; });
  if (!fits) refuse(text, parts, where);
  static const std::array<double, 4> seconds = {86400, 3600, 60, 1};
  double sum = 0;
  for (size_t i = 0; i < seconds.size(); ++i) sum += seconds[i] * std::stod(parts[i]);
  return Seconds(sum);
}

Seconds parse_duration(const std::map<std::string, int64_t>& units, const std::string& where) {
  double microseconds = 0;
  for (const auto& [name, count] : units) {
    const auto& known = units_in_microseconds();
    const auto unit = std::find_if(known.begin(), known.end(),
                                   [&name = name](const auto& one) { return one.first == name; });
    if (unit == known.end()) {
      std::vector<std::string> names;
      for (const auto& one : known) names.push_back(one.first);
      throw MisconfigurationError(str(subject(where), " with the unit \"", name,
                                      "\", which is none.", did_you_mean(name, names),
                                      " Known: ", join(names), "."));
    }
    microseconds += static_cast<double>(count) * static_cast<double>(unit->second);
  }
  if (microseconds < 0) {
    throw MisconfigurationError(
        str(subject(where), " of ", microseconds / 1e6, " seconds in sum, expected zero or more."));
  }
  return Seconds(microseconds / 1e6);
}

std::string format_duration(Seconds duration) {
  const auto [days, seconds, microseconds] = parts_of(duration);
  std::string text;
  if (days != 0) text = str(days, days == 1 ? " day, " : " days, ");
  char clock[48];
  std::snprintf(clock, sizeof(clock), "%lld:%02lld:%02lld", static_cast<long long>(seconds / 3600),
                static_cast<long long>(seconds / 60 % 60), static_cast<long long>(seconds % 60));
  text += clock;
  if (microseconds != 0) {
    std::snprintf(clock, sizeof(clock), ".%06lld", static_cast<long long>(microseconds));
    text += clock;
  }
  return text;
}

std::string python_timedelta(Seconds duration) {
  const auto [days, seconds, microseconds] = parts_of(duration);
  std::vector<std::string> arguments;
  if (days != 0) arguments.push_back(str("days=", days));
  if (seconds != 0) arguments.push_back(str("seconds=", seconds));
  if (microseconds != 0) arguments.push_back(str("microseconds=", microseconds));
  if (arguments.empty()) arguments.emplace_back("0");
  return "datetime.timedelta(" + join(arguments) + ")";
}

double monotonic_seconds() {
  return Seconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace lightning
