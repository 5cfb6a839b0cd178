// What a data loader yields and a step receives: a tree of tensors, lists and maps, with plain
// values between them. Moving, casting, pinning, slicing and the batch size are defined once, here.
//
//   Batch batch = Batch::map({{"image", images}, {"label", labels}});
//   at::cross_entropy_loss(net->forward(batch["image"]), batch["label"]);
//
// Copies share storages, as copies of a tensor do.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace lightning {

class Batch {
 public:
  using List = std::vector<Batch>;
  using Map = std::vector<std::pair<std::string, Batch>>;  // in the order given

  Batch() = default;  // none
  Batch(at::Tensor tensor) : value_(std::move(tensor)) {}
  Batch(bool value) : value_(value) {}
  Batch(int value) : value_(static_cast<int64_t>(value)) {}
  Batch(int64_t value) : value_(value) {}
  Batch(double value) : value_(value) {}
  Batch(const char* value) : value_(std::string(value)) {}
  Batch(std::string value) : value_(std::move(value)) {}
  static Batch list(List items);
  static Batch map(Map items);

  bool is_none() const { return std::holds_alternative<std::monostate>(value_); }
  bool is_tensor() const { return std::holds_alternative<at::Tensor>(value_); }
  bool is_list() const { return std::holds_alternative<List>(value_); }
  bool is_map() const { return std::holds_alternative<Map>(value_); }
  bool is_bool() const { return std::holds_alternative<bool>(value_); }
  bool is_int() const { return std::holds_alternative<int64_t>(value_); }
  bool is_double() const { return std::holds_alternative<double>(value_); }
  bool is_string() const { return std::holds_alternative<std::string>(value_); }

  // The tensor at a key of a map, at an index of a list, or of this node itself.
  // Errors: MisconfigurationError that shows what the node is and which keys it has.
  const at::Tensor& operator[](const std::string& key) const { return at(key).tensor(); }
  const at::Tensor& operator[](const char* key) const { return at(key).tensor(); }
  const at::Tensor& operator[](size_t index) const { return at(index).tensor(); }
  const at::Tensor& operator[](int index) const { return at(static_cast<size_t>(index)).tensor(); }
  const at::Tensor& tensor() const;

  // The node at a key or an index. Errors: as above.
  const Batch& at(const std::string& key) const;
  Batch& at(const std::string& key);
  const Batch& at(size_t index) const;
  Batch& at(size_t index);
  bool contains(const std::string& key) const;
  void set(const std::string& key, Batch value);  // adds to or replaces in a map

  // Children of a list or map; 0 otherwise.
  size_t size() const;
  const List& as_list() const;
  const Map& as_map() const;
  bool as_bool() const;
  int64_t as_int() const;
  double as_double() const;  // an int too
  const std::string& as_string() const;

  // The tree with every tensor replaced by `f` of it. Nodes without tensors are kept.
  Batch apply(const std::function<at::Tensor(const at::Tensor&)>& f) const;
  void for_each_tensor(const std::function<void(const at::Tensor&)>& f) const;

  // Tensors moved to the device; non-blocking where the source is pinned.
  Batch to(at::Device device) const;
  // Floating-point tensors cast; integers and booleans are never cast.
  Batch to_floating(at::ScalarType dtype) const;
  // Host tensors in page-locked memory, from which copies to a GPU run beside computation.
  Batch pin_memory() const;
  // Rows [begin, end) of every tensor that has at least one dim.
  Batch slice(int64_t begin, int64_t end) const;
  // Tensors cut off from the graph.
  Batch detach() const;

  // The first dim of the first tensor in the tree; 1 where that one is 0-dim.
  //   ambiguous   set to true where tensors disagree
  // nullopt when the tree holds no tensor at all.
  // Source: Lightning 2.6, `extract_batch_size`.
  std::optional<int64_t> batch_size(bool* ambiguous = nullptr) const;

  // One line on the tree: `{image: float32 [32, 784], label: int64 [32]}`.
  std::string describe() const;

 private:
  std::variant<std::monostate, at::Tensor, List, Map, bool, int64_t, double, std::string> value_;
};

// Wanted by `training_step` when a batch shall be left out: no backward, and no error.
struct Skip {};
inline constexpr Skip skip{};

// What a step returns: a loss, a loss with more values, or nothing.
class StepOutput {
 public:
  StepOutput() = default;
  StepOutput(Skip) {}
  StepOutput(at::Tensor loss) : loss_(std::move(loss)) {}
  StepOutput(Batch value);  // a map's "loss" is the loss

  bool skipped() const { return !loss_.defined() && extra_.is_none(); }

  // Scalar; undefined when the step was skipped or returned no loss.
  const at::Tensor& loss() const { return loss_; }
  // What the step returned beside or instead of a loss; a map keeps its "loss".
  const Batch& extra() const { return extra_; }
  StepOutput with_loss(at::Tensor loss) const;

 private:
  at::Tensor loss_;
  Batch extra_;
};

}  // namespace lightning
