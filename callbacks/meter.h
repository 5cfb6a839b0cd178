// The text of a progress bar: counts, times and rate, as tqdm lays them out.
// Source: tqdm 4.67, `tqdm.format_meter`; Lightning 2.6, `Tqdm.format_num`.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace lightning {

// What a bar shows after its rate, in order.
using ProgressMetrics =
    std::vector<std::pair<std::string, std::variant<int64_t, double, std::string>>>;

// How far something is.
struct Meter {
  std::string description;
  int64_t n = 0;
  std::optional<int64_t> total;  // nullopt: not known
  int64_t initial = 0;           // done before the clock started: not part of the rate
  double elapsed = 0;            // seconds

  // Iterations a second since the start; 0 when not known yet.
  double rate() const;
  // Seconds to go; nullopt when not known.
  std::optional<double> remaining() const;
};

// `Epoch 0:  75%|███████▌  | 3/4 [00:00<00:00, 93.54it/s, v_num=0, tl=0.141]`
//   postfix  ready text, from format_postfix; may be empty
//   width    columns to fill; 0 gives the bar 10
// The rate is in it/s even below one. An unknown total shows as "5/?" with an empty bar.
std::string format_meter(const Meter& meter, const std::string& postfix, int width);

// The same without the bar, for log files: `Epoch 0:  75% 3/4 [00:00<00:00, 93.54it/s, tl=0.141]`.
std::string format_meter_line(const Meter& meter, const std::string& postfix);

// "v_num=0, tl=0.141": whole numbers as they are, others with three significant digits and at least
// five characters, so that the line does not jump.
std::string format_postfix(const ProgressMetrics& metrics);

// One value of these. NaN and infinity print as such.
std::string format_metric(double value);

// [H:]MM:SS.
std::string format_interval(double seconds);

}  // namespace lightning
