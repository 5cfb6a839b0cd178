#include "loggers/csv_logger.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "lightning/files.h"
#include "lightning/hparams.h"
#include "lightning/log.h"
#include "lightning/python_text.h"
#include "lightning/registry.h"

namespace lightning {
namespace {

const Registration<Logger> kCSV{
    "CSVLogger", "Writes metrics.csv and hparams.yaml to save_dir/name/version.",
    [](const CSVLoggerOptions& options) { return std::make_shared<CSVLogger>(options); }};

constexpr const char* kStep = "step";
constexpr const char* kEpoch = "epoch";
constexpr const char* kLineEnd = "\r\n";
constexpr size_t kStepColumn = 0;

// Quoted where Python's csv module quotes.
std::string field(const std::string& text) {
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  std::string out = "\"";
  for (const char c : text) out += c == '"' ? std::string("\"\"") : std::string(1, c);
  return out + "\"";
}

std::string number(double value, bool whole) {
  constexpr double kExact = 9007199254740992.0;  // 2^53
  const bool integer = whole && std::abs(value) < kExact && value == std::trunc(value);
  return integer ? std::to_string(static_cast<int64_t>(value)) : python_repr(value);
}

std::vector<std::string> split(const std::string& line) {
  std::vector<std::string> cells;
  for (size_t begin = 0; begin <= line.size();) {
    const size_t end = std::min(line.find(',', begin), line.size());
    cells.push_back(line.substr(begin, end - begin));
    begin = end + 1;
  }
  return cells;
}

}  // namespace

CSVLogger::CSVLogger(const CSVLoggerOptions& options)
    : options_(options),
      dir_(options.save_dir(), options.name(), options.version()),
      hparams_(std::make_shared<Json>(Json::object())) {
  if (options_.flush_logs_every_n_steps() < 1) {
    throw MisconfigurationError(str("CSVLogger got flush_logs_every_n_steps ",
                                    options_.flush_logs_every_n_steps(),
                                    ", expected at least 1, which writes every row at once."));
  }
  add_column(kStep, true);
}

CSVLogger::~CSVLogger() {
  try {
    if (opened_) flush();
  } catch (const std::exception& error) {
    warn(str("CSVLogger lost its last ", row_ends_.size(), " rows: ", error.what()));
  }
}

void CSVLogger::open() {
  if (opened_) return;
  dir_.create();
  file_ = dir_.path() + "/metrics.csv";
  if (std::filesystem::exists(file_)) {
    warn(str("CSVLogger deletes ", file_,
             ", which another run left there. Give another version to keep both."));
    std::filesystem::remove(file_);
  }
  opened_ = true;
}

size_t CSVLogger::add_column(const std::string& name, bool whole) {
  columns_.push_back({name, whole});
  return columns_.size() - 1;
}

size_t CSVLogger::column(const std::string& metric) {
  const auto known = column_of_.find(metric);
  if (known != column_of_.end()) return known->second;
  const auto& prefix = options_.prefix();
  const std::string name = prefix.empty() ? metric : prefix + "-" + metric;
  // The step has the last word over a metric of its name.
  const size_t column = name == kStep ? kStepColumn : add_column(name, metric == kEpoch);
  column_of_.emplace(metric, column);
  return column;
}

void CSVLogger::log_metrics(const MetricRow& metrics, int64_t step) {
  open();
  for (const auto& [name, value] : metrics) cells_.push_back({column(name), value});
  cells_.push_back({kStepColumn, static_cast<double>(step)});
  row_ends_.push_back(cells_.size());
  if ((step + 1) % options_.flush_logs_every_n_steps() == 0) flush();
}

void CSVLogger::log_hyperparams(const Json& hparams) {
  open();
  for (const auto& [key, value] : hparams.items()) (*hparams_)[key] = value;
  save_hparams_to_yaml(dir_.path() + "/hparams.yaml", *hparams_);
}

void CSVLogger::save() {
  open();
  flush();
}

void CSVLogger::finalize(const std::string&) {
  if (opened_) flush();
}

void CSVLogger::flush() {
  if (row_ends_.empty()) return;
  const bool fresh = !std::filesystem::exists(file_);
  if (order_.size() < columns_.size()) {
    const auto order = sorted_columns();
    const auto old_rows = fresh ? "" : written_rows(order);
    write_file(file_, header_line(order) + old_rows + pending_rows(order));
    order_ = order;
  } else {
    append_file(file_, (fresh ? header_line(order_) : "") + pending_rows(order_));
  }
  cells_.clear();
  row_ends_.clear();
}

std::vector<size_t> CSVLogger::sorted_columns() const {
  std::vector<size_t> order(columns_.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return columns_[a].name < columns_[b].name; });
  return order;
}

std::string CSVLogger::header_line(const std::vector<size_t>& order) const {
  std::string line;
  for (const size_t i : order) line += (line.empty() ? "" : ",") + field(columns_[i].name);
  return line + kLineEnd;
}

std::string CSVLogger::pending_rows(const std::vector<size_t>& order) const {
  std::vector<std::string> row(columns_.size());
  std::string text;
  size_t cell = 0;
  for (const size_t end : row_ends_) {
    for (auto& value : row) value.clear();
    for (; cell < end; ++cell) {
      const auto& [column, value] = cells_[cell];
      row[column] = number(value, columns_[column].whole);
    }
    for (size_t i = 0; i < order.size(); ++i) text += (i == 0 ? "" : ",") + row[order[i]];
    text += kLineEnd;
  }
  return text;
}

// The rows that are in the file, their cells moved to `order`, with empty ones for new columns.
std::string CSVLogger::written_rows(const std::vector<size_t>& order) const {
  const std::string old = read_file(file_);
  const std::string header = header_line(order_);
  if (old.compare(0, header.size(), header) != 0) {
    throw std::runtime_error(
        str("Cannot add columns to ", file_,
            ": its first line is not the one that this run wrote, so its columns are not known. "
            "Move the file away; the next write starts a new one."));
  }
  std::vector<size_t> old_place(columns_.size(), SIZE_MAX);
  for (size_t i = 0; i < order_.size(); ++i) old_place[order_[i]] = i;
  std::string text;
  for (size_t begin = header.size(); begin < old.size();) {
    const size_t end = std::min(old.find(kLineEnd, begin), old.size());
    const auto cells = split(old.substr(begin, end - begin));
    for (size_t i = 0; i < order.size(); ++i) {
      const size_t place = old_place[order[i]];
      if (i > 0) text += ",";
      if (place < cells.size()) text += cells[place];
    }
    text += kLineEnd;
    begin = end + 2;
  }
  return text;
}

}  // namespace lightning
