#include "lightning/results_table.h"

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <set>

#include "lightning/errors.h"
#include "lightning/python_text.h"
#include "lightning/terminal.h"

namespace lightning {
namespace {

using Row = std::map<std::string, double>;

Row without_loader_names(const Row& metrics) {
  Row out;
  for (const auto& [name, value] : metrics) {
    out[name.substr(0, name.find("/dataloader_idx_"))] = value;
  }
  return out;
}

std::string capitalized(std::string text) {
  for (size_t i = 0; i < text.size(); ++i) {
    const auto c = static_cast<unsigned char>(text[i]);
    text[i] = static_cast<char>(i == 0 ? std::toupper(c) : std::tolower(c));
  }
  return text;
}

// The cells centred in columns of one width, without spaces at the end.
std::string table_line(const std::vector<std::string>& cells, int width) {
  std::string line;
  for (const auto& cell : cells) line += center(cell, width);
  const auto end = line.find_last_not_of(' ');
  return line.substr(0, end == std::string::npos ? 0 : end + 1) + "\n";
}

// A name longer than half the terminal goes over several lines, the values beside all but the last.
std::string metric_lines(std::string name, const std::vector<std::string>& values, int width,
                         int half) {
  std::vector<std::string> cells(1);
  cells.insert(cells.end(), values.begin(), values.end());
  if (display_width(name) <= half) {
    cells[0] = name;
    return table_line(cells, width);
  }
  std::string lines;
  while (display_width(name) > half) {
    cells[0] = trim_to_width(name, half);
    name.erase(0, cells[0].size());
    lines += table_line(cells, width);
  }
  return lines + table_line({name, " "}, width);
}

}  // namespace

std::string format_results_table(const std::vector<std::map<std::string, double>>& results,
                                 const std::string& stage, int width) {
  if (width <= 0) width = 120;
  std::vector<Row> loaders;
  std::set<std::string> names;
  for (const auto& metrics : results) {
    loaders.push_back(without_loader_names(metrics));
    for (const auto& entry : loaders.back()) names.insert(entry.first);
  }
  if (names.empty()) return "";

  const std::string last_header = str("DataLoader ", loaders.size() - 1);
  int column = std::max(25, display_width(last_header));
  for (const auto& name : names) column = std::max(column, display_width(name));
  column = std::max(1, std::min(column, width / 2));
  const auto per_table = static_cast<size_t>(std::max(1, (width - column) / column));

  const std::string rule = repeat("─", width) + "\n";
  std::string out;
  for (size_t first = 0; first < loaders.size(); first += per_table) {
    const size_t end = std::min(loaders.size(), first + per_table);
    std::vector<std::string> headers = {capitalized(stage + " metric")};
    for (size_t i = first; i < end; ++i) headers.push_back(str("DataLoader ", i));
    out += rule + table_line(headers, column) + rule;
    for (const auto& name : names) {
      std::vector<std::string> values;
      for (size_t i = first; i < end; ++i) {
        const auto found = loaders[i].find(name);
        values.push_back(found == loaders[i].end() ? " " : python_repr(found->second));
      }
      out += metric_lines(name, values, column, width / 2);
    }
    out += rule;
  }
  return out;
}

}  // namespace lightning
