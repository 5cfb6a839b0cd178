#include "lightning/optim/group_values.h"

#include <torch/optim/optimizer.h>

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <unordered_map>

namespace lightning {
namespace {

std::mutex mutex;

// An entry ends with the last schedule, which does not outlive the optimizer it holds; so an
// address that is used again finds nothing of its predecessor.
std::unordered_map<const torch::optim::Optimizer*, std::weak_ptr<GroupValues>>& table() {
  static auto* entries =
      new std::unordered_map<const torch::optim::Optimizer*, std::weak_ptr<GroupValues>>();
  return *entries;
}

template <class Values>
auto find_name(Values& values, const std::string& name) {
  return std::find_if(values.begin(), values.end(),
                      [&](const auto& value) { return value.first == name; });
}

}  // namespace

double& NamedValues::operator[](const std::string& name) {
  const auto found = find_name(values_, name);
  return found != values_.end() ? found->second : values_.emplace_back(name, 0.0).second;
}

double NamedValues::at(const std::string& name) const {
  const auto found = find_name(values_, name);
  if (found == values_.end()) throw std::out_of_range("a parameter group has no " + name);
  return found->second;
}

bool NamedValues::contains(const std::string& name) const {
  return find_name(values_, name) != values_.end();
}

void NamedValues::move_to_end(const std::string& name) {
  const auto found = find_name(values_, name);
  if (found != values_.end()) std::rotate(found, found + 1, values_.end());
}

std::shared_ptr<GroupValues> GroupValues::of(const torch::optim::Optimizer& optimizer) {
  const std::lock_guard<std::mutex> lock(mutex);
  auto values = table()[&optimizer].lock();
  if (values == nullptr) {
    values = std::shared_ptr<GroupValues>(new GroupValues, [key = &optimizer](GroupValues* gone) {
      delete gone;
      const std::lock_guard<std::mutex> lock(mutex);
      const auto entry = table().find(key);
      if (entry != table().end() && entry->second.expired()) table().erase(entry);
    });
    table()[&optimizer] = values;
  }
  values->groups.resize(std::max(values->groups.size(), optimizer.param_groups().size()));
  return values;
}

std::shared_ptr<GroupValues> GroupValues::find(const torch::optim::Optimizer& optimizer) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto entry = table().find(&optimizer);
  return entry == table().end() ? nullptr : entry->second.lock();
}

bool GroupValues::is_name(const std::string& key) {
  static const char* const names[] = {"initial_lr", "max_lr", "min_lr", "base_momentum",
                                      "max_momentum"};
  return std::find(std::begin(names), std::end(names), key) != std::end(names);
}

}  // namespace lightning
