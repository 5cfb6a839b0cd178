// Logged values by name, in the order they were first logged.
#pragma once

#include <ATen/core/Tensor.h>

#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace lightning {

// Scalars on the device they were made on.
class MetricMap {
 public:
  using Item = std::pair<std::string, at::Tensor>;

  at::Tensor& operator[](const std::string& name) {
    const auto [place, added] = places_.emplace(name, items_.size());
    if (added) items_.emplace_back(name, at::Tensor());
    return items_[place->second].second;
  }
  // Errors: std::out_of_range for a name that was not logged.
  const at::Tensor& at(const std::string& name) const {
    const auto found = find(name);
    if (found == end()) throw std::out_of_range("no metric \"" + name + "\" was logged");
    return found->second;
  }
  std::vector<Item>::const_iterator find(const std::string& name) const {
    const auto place = places_.find(name);
    return place == places_.end() ? items_.end()
                                  : items_.begin() + static_cast<std::ptrdiff_t>(place->second);
  }
  size_t count(const std::string& name) const { return places_.count(name); }
  size_t size() const { return items_.size(); }
  bool empty() const { return items_.empty(); }
  std::vector<Item>::const_iterator begin() const { return items_.begin(); }
  std::vector<Item>::const_iterator end() const { return items_.end(); }
  void clear() {
    items_.clear();
    places_.clear();
  }

 private:
  std::vector<Item> items_;
  std::unordered_map<std::string, size_t> places_;
};

}  // namespace lightning
