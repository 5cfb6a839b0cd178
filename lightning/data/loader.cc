#include "lightning/data/loader.h"

#include <atomic>

namespace lightning {
namespace {

// Rebuilds the tree, taking leaves in order.
Loaders rebuild(const Loaders& tree, const std::vector<std::shared_ptr<Loader>>& leaves,
                size_t& next) {
  if (tree.single() != nullptr) return leaves.at(next++);
  std::vector<std::pair<std::string, Loaders>> items;
  for (const auto& [name, item] : tree.items())
    items.emplace_back(name, rebuild(item, leaves, next));
  if (tree.is_map()) return Loaders::map(std::move(items));
  std::vector<Loaders> list;
  for (auto& item : items) list.push_back(std::move(item.second));
  return list;
}

Batch shape_batch(const Loaders& tree, const std::vector<Batch>& leaves, size_t& next) {
  if (tree.single() != nullptr) return leaves.at(next++);
  Batch::Map items;
  for (const auto& [name, item] : tree.items()) {
    items.emplace_back(name, shape_batch(item, leaves, next));
  }
  if (tree.is_map()) return Batch::map(std::move(items));
  Batch::List list;
  for (auto& item : items) list.push_back(std::move(item.second));
  return Batch::list(std::move(list));
}

void collect(const Loaders& tree, std::vector<std::shared_ptr<Loader>>& leaves) {
  if (tree.single() != nullptr) leaves.push_back(tree.single());
  for (const auto& item : tree.items()) collect(item.second, leaves);
}

std::atomic<WaitCheck> wait_check{nullptr};

}  // namespace

WaitCheck set_wait_check(WaitCheck check) { return wait_check.exchange(check); }

void check_while_waiting() {
  if (const WaitCheck check = wait_check.load()) check();
}

std::vector<std::pair<std::string, Loaders>> Loaders::named(std::vector<Loaders> items) {
  std::vector<std::pair<std::string, Loaders>> out;
  for (auto& item : items) out.emplace_back("", std::move(item));
  return out;
}

std::vector<std::shared_ptr<Loader>> Loaders::flatten() const {
  std::vector<std::shared_ptr<Loader>> leaves;
  collect(*this, leaves);
  return leaves;
}

Loaders Loaders::with_leaves(const std::vector<std::shared_ptr<Loader>>& leaves) const {
  size_t next = 0;
  return rebuild(*this, leaves, next);
}

Batch Loaders::unflatten(const std::vector<Batch>& leaves) const {
  size_t next = 0;
  return shape_batch(*this, leaves, next);
}

}  // namespace lightning
