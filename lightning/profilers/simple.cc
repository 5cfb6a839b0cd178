#include "lightning/profilers/simple.h"

#include <algorithm>
#include <cctype>
#include <numeric>

#include "lightning/errors.h"
#include "lightning/files.h"
#include "lightning/log.h"
#include "lightning/python_format.h"
#include "lightning/registry.h"

namespace lightning {
namespace {

const Registration<Profiler> kSimple{
    "simple", "Reports how long each action took.",
    [](const SimpleProfilerOptions& options) { return std::make_unique<SimpleProfiler>(options); }};

constexpr int kTabStop = 8;
constexpr size_t kColumn = 15;

std::string digits(double value) { return python_format(value, ".5"); }

std::string padded(const std::string& text, size_t width) {
  return text.size() < width ? text + std::string(width - text.size(), ' ') : text;
}

// "\n|  cell\t|  cell\t|" with the first column as wide as the longest action.
std::string table_row(const std::vector<std::string>& cells, size_t first_width) {
  std::string row = "\n";
  for (size_t i = 0; i < cells.size(); ++i) {
    row += (i == 0 ? "|  " : "  ") + padded(cells[i], i == 0 ? first_width : kColumn) + "\t|";
  }
  return row;
}

// Characters of a row, its line break too, with tabs drawn out. Source: Python's `expandtabs`.
size_t drawn_length(const std::string& row) {
  size_t length = 0;
  size_t column = 0;
  for (const char c : row) {
    const size_t step = c == '\t' ? kTabStop - column % kTabStop : 1;
    length += step;
    column = c == '\n' ? 0 : column + step;
  }
  return length;
}

std::string upper(std::string text) {
  for (char& c : text) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  return text;
}

}  // namespace

SimpleProfiler::SimpleProfiler(SimpleProfilerOptions options)
    : options_(std::move(options)), created_(Clock::now()) {}

void SimpleProfiler::start(const std::string& action) {
  const auto [found, is_new] = index_.emplace(action, actions_.size());
  if (is_new) actions_.push_back({action, {}, std::nullopt});
  Action& one = actions_[found->second];
  if (one.started) {
    throw std::invalid_argument(
        str("SimpleProfiler: \"", action, "\" was started while it runs. Stop it first."));
  }
  one.started = Clock::now();
}

void SimpleProfiler::stop(const std::string& action) {
  const auto now = Clock::now();
  const auto found = index_.find(action);
  if (found == index_.end() || !actions_[found->second].started) {
    throw std::invalid_argument(
        str("SimpleProfiler: \"", action, "\" was stopped, but it was not started."));
  }
  Action& one = actions_[found->second];
  one.seconds.push_back(std::chrono::duration<double>(now - *one.started).count());
  one.started.reset();
}

std::vector<double> SimpleProfiler::durations(const std::string& action) const {
  const auto found = index_.find(action);
  return found == index_.end() ? std::vector<double>() : actions_[found->second].seconds;
}

std::vector<SimpleProfiler::Row> SimpleProfiler::rows(double total) const {
  std::vector<Row> rows;
  for (const Action& action : actions_) {
    if (action.seconds.empty()) continue;
    const double sum = std::accumulate(action.seconds.begin(), action.seconds.end(), 0.0);
    const size_t calls = action.seconds.size();
    rows.push_back({action.name, sum / calls, calls, sum, 100.0 * sum / total});
  }
  std::stable_sort(rows.begin(), rows.end(), [this](const Row& a, const Row& b) {
    return options_.extended() ? a.percentage > b.percentage : a.mean > b.mean;
  });
  return rows;
}

std::string SimpleProfiler::summary() const {
  const double total = std::chrono::duration<double>(Clock::now() - created_).count();
  const auto all = rows(total);
  const bool extended = options_.extended();
  std::string out = (stage_ ? upper(to_string(*stage_)) + " " : "") + "Profiler Report\n";
  if (all.empty()) return out + "\n";

  size_t width = 0;
  size_t calls = 0;
  for (const Row& row : all) {
    width = std::max(width, row.action.size());
    calls += row.calls;
  }
  const auto header =
      extended ? table_row(
                     {"Action", "Mean duration (s)", "Num calls", "Total time (s)", "Percentage %"},
                     width)
               : table_row({"Action", "Mean duration (s)", "Total time (s)"}, width);
  const std::string rule = "\n" + std::string(drawn_length(header), '-');
  out += rule + header + rule;
  if (extended) {
    out += table_row({"Total", "-", std::to_string(calls), digits(total), "100 %"}, width) + rule;
  }
  for (const Row& row : all) {
    out += extended ? table_row({row.action, digits(row.mean), std::to_string(row.calls),
                                 digits(row.total), digits(row.percentage)},
                                width)
                    : table_row({row.action, digits(row.mean), digits(row.total)}, width);
  }
  return out + rule + "\n";
}

void SimpleProfiler::setup(Stage stage, int64_t rank, const std::string& log_dir) {
  stage_ = stage;
  rank_ = rank;
  if (!options_.dirpath() && !log_dir.empty()) options_.dirpath(log_dir);
}

// "fit-report-0.txt". Source: Lightning 2.6, `Profiler._prepare_filename`.
std::string SimpleProfiler::file_name() const {
  std::vector<std::string> parts;
  if (stage_) parts.push_back(to_string(*stage_));
  parts.push_back(*options_.filename());
  if (rank_) parts.push_back(std::to_string(*rank_));
  std::string name;
  for (const char c : join(parts, "-")) {
    const bool unsafe = std::string("\\/:*?\"<>|\n\r\t_").find(c) != std::string::npos;
    if (!unsafe || name.empty() || name.back() != '_') name += unsafe ? '_' : c;
  }
  return name + ".txt";
}

void SimpleProfiler::describe() {
  const bool to_file = options_.filename() && !options_.filename()->empty() && options_.dirpath();
  if (to_file) {
    make_directories(*options_.dirpath());
    append_file(*options_.dirpath() + "/" + file_name(), summary());
  } else if (rank_.value_or(0) == 0) {
    info(summary());
  }
}

}  // namespace lightning
