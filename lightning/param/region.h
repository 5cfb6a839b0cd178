// A region as it is recorded and replayed; replay.h says what for. Records are made on one thread,
// by the operators that it runs and the saving of tensors; values are asked for by any.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/ivalue.h>

#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "lightning/param/operands.h"
#include "lightning/param/touch.h"

namespace lightning {

class Region {
 public:
  using Function = std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>&)>;
  using Filling =
      std::function<void(const std::vector<at::Tensor>&, const std::vector<at::Tensor>&)>;
  static constexpr int32_t kNone = -1;

  explicit Region(std::string name) : name_(std::move(name)) {}

  const std::string& name() const { return name_; }

  // Replays of all regions since the last call.
  static int64_t take_replayed();

  // ---- While it is recorded ---------------------------------------------------------------------

  void before(const c10::OperatorHandle& op, Stack& stack);
  void after(const c10::OperatorHandle& op, Stack& stack);
  std::vector<at::Tensor> run(const std::vector<at::Tensor>& inputs, const Function& function);
  void fill(const std::vector<at::Tensor>& inputs, const std::vector<at::Tensor>& outputs,
            const Filling& function);
  void keep(const at::Tensor& tensor);
  void finish();

  // The value that was made in the region and can be made anew; kNone for another tensor.
  int32_t made_value(const at::Tensor& tensor);

  // ---- In backward ------------------------------------------------------------------------------

  // `tensor` is the value, which autograd saves. While others keep its memory nothing is replayed
  // for it.
  void want(int32_t value, const at::Tensor& tensor);
  void forget(int32_t value);
  at::Tensor get(int32_t value);

 private:
  using WeakTensor = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
  using WeakStorage = c10::weak_intrusive_ptr<c10::StorageImpl>;

  // A tensor of the region. One of: made by a step; held, from outside; a shallow copy of a made
  // one that no operator gave (of `shape`, over the memory of value `base`).
  struct Value {
    std::optional<WeakTensor> original;  // keeps its address from being used again
    at::Tensor outside;
    std::optional<Shape> shape;
    std::optional<WeakStorage> storage;  // of one that is wanted
    int32_t base = kNone;
    int32_t memory = kNone;
    uint32_t version = 0;  // of `outside`, at the end of the region
    int32_t last_use = kNone;
    int64_t wanted = 0;  // by what autograd saved
  };
  // The memory of tensors.
  struct Memory {
    std::optional<WeakStorage> original;  // likewise
    bool made = false;                    // by a step
    bool unwritten = false;               // so far, by operators
    int32_t base = kNone;                 // the first value that has it
    at::Tensor before;                    // bytes of outside memory, before a step first wrote it
  };
  // An argument that is a tensor: in `arguments[argument]`, or there in a list.
  struct Place {
    size_t argument;
    int64_t element;  // -1 where it is no list
    int32_t value;
  };
  struct Step {
    std::optional<c10::OperatorHandle> op;  // or function
    Function function;
    Stack arguments;  // with undefined tensors
    std::vector<Place> places;
    std::vector<int32_t> results;  // kNone for what is no new tensor
    std::vector<int32_t> written;  // memories
    bool random = false;
    bool grad_mode = at::GradMode::is_enabled();  // some kernels ask for it
  };
  struct GeneratorState {
    at::Generator generator;
    at::Tensor state;
  };

  int32_t memory_of(const at::Tensor& tensor, bool made);
  int32_t new_value(const at::Tensor& tensor, int32_t memory);
  int32_t find(const at::Tensor& tensor);
  int32_t find_or_hold(const at::Tensor& tensor);
  void hold_unwritten(int32_t memory);
  void save_before_write(int32_t memory, const at::Tensor& tensor);
  void note_generator(const Stack& stack, size_t first);
  bool is_kept_from_birth(const OperatorTraits& traits, const Stack& stack, size_t first) const;
  void add_argument(Step& step, size_t argument, int64_t element, const at::Tensor& tensor,
                    bool written);
  void add_result(Step& step, const at::Tensor& tensor, bool keep, bool unwritten);
  void add_read(Step& step, const at::Tensor& tensor);
  void add_filled(Step& step, const at::Tensor& tensor);

  std::vector<bool> needed_steps() const;
  void drop_unneeded(const std::vector<bool>& needed);
  void check_versions() const;
  void replay();
  at::Tensor alive(const Value& value) const;
  at::Tensor resolve(int32_t value);
  Stack stack_of(const Step& step);
  void run_step(const Step& step);

  std::string name_;
  std::vector<Value> values_;
  std::vector<Memory> memories_;
  std::vector<Step> steps_;
  std::unordered_map<const void*, int32_t> value_at_, memory_at_;
  std::vector<GeneratorState> generators_;
  std::optional<Step> running_;  // between before() and after()
  bool running_keeps_ = false;

  std::mutex mutex_;
  bool replayed_ = false;
  std::vector<at::Tensor> live_;                      // by value, in and after a replay
  std::unordered_map<int32_t, c10::Storage> copies_;  // of outside memory, in a replay
};

// A tensor as autograd holds it: no history, and the version counter of the original.
at::Tensor held(const at::Tensor& tensor);

// The error for a tensor that was written since a region saw it.
std::string modified(const std::string& region, const at::Tensor& tensor, int64_t version,
                     int64_t expected);

}  // namespace lightning
