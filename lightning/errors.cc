#include "lightning/errors.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace lightning {
namespace {

// Levenshtein distance with swaps of neighbours ("fdsp" is one away from "fsdp").
size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<size_t> before, last(b.size() + 1), row(b.size() + 1);
  std::iota(last.begin(), last.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      row[j] = std::min({last[j] + 1, row[j - 1] + 1, last[j - 1] + (a[i - 1] != b[j - 1])});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        row[j] = std::min(row[j], before[j - 2] + 1);
      }
    }
    before = last;
    last = row;
  }
  return last[b.size()];
}

std::string lower(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return text;
}

}  // namespace

std::string join(const std::vector<std::string>& words, const std::string& separator) {
  std::string out;
  for (const auto& word : words) out += (out.empty() ? "" : separator) + word;
  return out;
}

std::string did_you_mean(const std::string& name, const std::vector<std::string>& known) {
  std::vector<std::pair<size_t, std::string>> near;
  const auto wanted = lower(name);
  for (const auto& candidate : known) {
    auto distance = edit_distance(wanted, lower(candidate));
    const bool part = wanted.size() >= 3 && lower(candidate).find(wanted) != std::string::npos;
    if (part) distance = std::min(distance, size_t{2});
    if (distance <= std::max<size_t>(1, name.size() / 3)) near.emplace_back(distance, candidate);
  }
  std::stable_sort(near.begin(), near.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  if (near.empty()) return "";
  std::vector<std::string> quoted;
  for (size_t i = 0; i < std::min<size_t>(3, near.size()); ++i) {
    quoted.push_back('"' + near[i].second + '"');
  }
  return " Did you mean " + join(quoted, " or ") + "?";
}

}  // namespace lightning
