#include "callbacks/rich_model_summary.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "lightning/errors.h"
#include "lightning/registry.h"
#include "lightning/terminal.h"

namespace lightning {
namespace {

const Registration<Callback> kRichModelSummary{
    "RichModelSummary", "Prints layers, their parameters and modes when fit starts, in a table.",
    [](const RichModelSummaryOptions& options) {
      return std::make_shared<RichModelSummary>(options);
    }};

constexpr int kLeastColumn = 4;
constexpr size_t kName = 1, kType = 2;  // columns that may be cut

bool is_right(const std::string& header) { return header == "Params" || header == "FLOPs"; }

std::vector<int> column_widths(const std::vector<SummaryColumn>& columns, int limit) {
  std::vector<int> widths;
  int all = 1;
  for (const auto& column : columns) {
    int width = display_width(column.header);
    for (const auto& cell : column.cells) width = std::max(width, display_width(cell));
    widths.push_back(width);
    all += width + 3;
  }
  for (; limit > 0 && all > limit; --all) {
    int& wider = widths[kName] >= widths[kType] ? widths[kName] : widths[kType];
    if (wider <= kLeastColumn) break;
    --wider;
  }
  return widths;
}

std::string without_spaces_at_end(const std::string& text) {
  return text.substr(0, text.find_last_not_of(' ') + 1);
}

std::string fitted(const std::string& text, int width, bool right) {
  if (display_width(text) > width) return trim_to_width(text, width - 1) + "…";
  return right ? pad_left(without_spaces_at_end(text), width) : pad_right(text, width);
}

// "┏━━━┳━━━━━━┓"
std::string rule(const std::vector<int>& widths, const char* left, const char* line,
                 const char* middle, const char* right) {
  std::string out = left;
  for (size_t i = 0; i < widths.size(); ++i) {
    out += (i == 0 ? "" : middle) + repeat(line, widths[i] + 2);
  }
  return out + right + "\n";
}

}  // namespace

RichModelSummary::RichModelSummary(const RichModelSummaryOptions& options)
    : ModelSummary(ModelSummaryOptions().max_depth(options.max_depth())),
      header_(Style::parse(options.header_style(), "RichModelSummary's header_style")) {}

std::string RichModelSummary::format(const Summary& summary) const {
  const bool terminal = output().is_terminal();
  return format_rich_summary(summary, header_, terminal ? output().columns() : 0,
                             terminal ? terminal_colors() : ColorSystem::kNone);
}

std::string format_rich_summary(const Summary& summary, const Style& header, int width,
                                ColorSystem colors) {
  const auto columns = summary_columns(summary);
  const auto widths = column_widths(columns, width);
  static const Style dim = Style::parse("dim", "index");
  std::string out = rule(widths, "┏", "━", "┳", "┓");
  for (size_t i = 0; i < columns.size(); ++i) {
    const auto& name = columns[i].header;
    out += "┃" + header.paint(" " + fitted(name, widths[i], is_right(name)) + " ", colors);
  }
  out += "┃\n" + rule(widths, "┡", "━", "╇", "┩");
  for (size_t row = 0; row < columns[0].cells.size(); ++row) {
    for (size_t i = 0; i < columns.size(); ++i) {
      const std::string cell =
          " " + fitted(columns[i].cells[row], widths[i], is_right(columns[i].header)) + " ";
      out += "│" + (i == 0 ? dim.paint(cell, colors) : cell);
    }
    out += "│\n";
  }
  out += rule(widths, "└", "─", "┴", "┘");

  static const Style bold = Style::parse("bold", "label");
  const int64_t frozen = summary.total_parameters - summary.trainable_parameters;
  const std::pair<const char*, std::string> totals[] = {
      {"Trainable params", human_readable_count(summary.trainable_parameters)},
      {"Non-trainable params", human_readable_count(frozen)},
      {"Total params", human_readable_count(summary.total_parameters)},
      {"Total estimated model params size (MB)", formatted_model_size(summary.size_mb)},
      {"Modules in train mode", std::to_string(summary.train_modules)},
      {"Modules in eval mode", std::to_string(summary.eval_modules)},
      {"Total FLOPs", human_readable_count(summary.total_flops)}};
  for (const auto& [label, value] : totals) {
    out += bold.paint(label, colors) + ": " + without_spaces_at_end(value) + "\n";
  }
  return out;
}

}  // namespace lightning
