// What stands behind a parameter. A parameter that has a backing shows its global shape and, most
// of the time, has no memory; when an operator reads it, or a view of it, its backing is told and
// makes it whole: gathers its shards, decodes 4 bits, fetches it from the host. So no module is
// wrapped or replaced, any method of the model works, and parameters without a backing, as all
// other tensors, cost nothing. An operator that reads a backed parameter pays about 0.15 us.
//
// How: the parameter's tensor carries the dispatch key `Fake`, which LibTorch leaves to others and
// which every view inherits. It lies below autograd and autocast: these see an ordinary tensor, and
// what they save of it are views without memory of their own. Operators that only look at sizes or
// make views (t, narrow, detach) touch nothing.
//
// Backings stack: what a backing reads may have a backing itself.
//
// Code that takes a tensor's address instead of calling an operator says whole(tensor) first; it
// gets LibTorch's "data is not allocated yet" otherwise.
//
// The thread that runs the operator calls the backing: the one that called fit(), or in backward
// the one that autograd runs for a GPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace c10 {
class OperatorHandle;
struct IValue;
}  // namespace c10

namespace lightning {

class BackedParameter;
class TouchStorage;

// One operator about to read or write a backed parameter.
struct Touch {
  BackedParameter& parameter;
  // What the operator was given: the parameter or a view of it, which shows sizes and strides.
  at::Tensor tensor;
  // Null where whole() was called.
  const c10::OperatorHandle* op = nullptr;
  // In before() ends with the operator's arguments, which may be replaced; in after() with its
  // results. Null where `op` is.
  std::vector<c10::IValue>* stack = nullptr;
  // The operator writes into the parameter (copy_, add_), as an initialiser or a clamp does.
  bool writes = false;
  // The same for all parameters of one operator: what was made whole for it must stay so until it
  // has run. Where making one whole released another all the same, the other is touched again.
  uint64_t serial = 0;
  // Whatever before() wants after() to know.
  int64_t note = 0;

  std::string operator_name() const;  // "aten::addmm"; "whole()" where there is none
};

class Backing {
 public:
  virtual ~Backing() = default;

  // Makes touch.parameter whole, or throws what the caller of the operator shall see. Runs below
  // autograd and autocast; operators it calls may touch other backed parameters.
  virtual void before(Touch& touch) = 0;

  // For one that acts on results too, say by reducing a partial sum: once for each parameter of its
  // own that the operator was given.
  virtual bool wants_results() const { return false; }
  virtual void after(Touch&) {}

  // While it is set, before() has nothing to do for any parameter of this backing that an operator
  // reads, and is not called. Writes and results are always told.
  bool asleep() const { return asleep_.load(std::memory_order_relaxed); }
  void set_asleep(bool asleep) { asleep_.store(asleep, std::memory_order_relaxed); }

 private:
  std::atomic<bool> asleep_{false};
};

// Told of every operator that is given the parameter to read or write, whether or not its backing
// sleeps, and before that.
class TouchListener {
 public:
  virtual ~TouchListener() = default;
  virtual void touched(BackedParameter& parameter) = 0;
};

// How a parameter looks and where it lies while it is whole.
struct BackedOptions {
  std::optional<at::ScalarType> dtype;  // else the parameter's own
  std::optional<at::Device> device;     // likewise
  int64_t padded_rows = 0;              // dim 0 of its memory, where that is larger than its own
};

// A parameter with a backing, from the construction of this on to its end.
//
// Owned by whoever owns the backing, which must outlive it. The parameter stays the same tensor
// object with the same autograd state. Its strides stay where they are dense with dim 0 outermost
// (so the rows of a shard lie together), else it becomes contiguous.
class BackedParameter {
 public:
  // The parameter keeps its values, in the dtype and on the device asked for, and is whole until
  // release(); one on the meta device has none to keep and is not.
  // Errors: MisconfigurationError for a parameter that has a backing already, or is sparse or
  // quantized.
  BackedParameter(std::string name, at::Tensor parameter, Backing& backing,
                  const BackedOptions& options = {});
  // A parameter that is whole keeps its values; reading one that is not is then an error that names
  // it.
  ~BackedParameter();
  BackedParameter(const BackedParameter&) = delete;
  BackedParameter& operator=(const BackedParameter&) = delete;

  const std::string& name() const { return name_; }
  Backing& backing() const { return backing_; }
  const at::Tensor& parameter() const { return parameter_; }

  // ---- Its memory -------------------------------------------------------------------------------

  bool is_whole() const;
  // Fresh memory of allocated_bytes(), with nothing in it.
  void allocate();
  // Takes over the memory of a contiguous tensor of memory()'s dtype and device that nobody else
  // holds.
  void give(at::Tensor memory);
  void release();
  size_t allocated_bytes() const;

  // The memory, as [padded rows, ...] without the key: what collectives and copies write into.
  // The same object each time; empty of data while the parameter is not whole.
  const at::Tensor& memory() const { return memory_; }

  // Ends the backing: from now on the parameter is an ordinary one over `data`.
  void restore(at::Tensor data);
  // False once somebody gave the parameter other data behind our back: set_data(), Module::to().
  bool is_in_place() const;
  // After an optimizer's step changed what is behind it: backward through an older graph is then
  // an error, as it is for an ordinary parameter.
  void mark_changed();

  // ---- Its gradient -----------------------------------------------------------------------------

  // Called in backward on each gradient that arrives, after it was added to .grad(); null for
  // nothing. LibTorch's own tensor hooks come before that, and cannot drop a gradient.
  void on_gradient(std::function<void()> hook);
  // .grad(), which is cleared by it; undefined where there is none.
  at::Tensor take_gradient();

  // Null for none; must outlive this, or be taken away.
  void listen(TouchListener* listener) { listener_ = listener; }
  TouchListener* listener() const { return listener_; }

 private:
  friend class TouchStorage;

  void show(const at::Tensor& data, const BackedOptions& options);
  void take_values(const at::Tensor& data);

  std::string name_;
  at::Tensor parameter_;
  at::Tensor memory_;
  Backing& backing_;
  TouchStorage* storage_ = nullptr;  // held by memory_
  TouchListener* listener_ = nullptr;
};

// Sees the operators of a thread, below autograd and autocast, while it is watching there.
// Operators that a backing calls to make a parameter whole are not shown.
class OperatorWatch {
 public:
  virtual ~OperatorWatch() = default;
  // The stack ends with the arguments; what is touched is whole.
  virtual void before(const c10::OperatorHandle& op, std::vector<c10::IValue>& stack) = 0;
  // The stack ends with the results. Not called where the operator threw.
  virtual void after(const c10::OperatorHandle& op, std::vector<c10::IValue>& stack) = 0;
};

// Makes `watch` the thread's own, null for none. Gives the one before.
OperatorWatch* watch_operators(OperatorWatch* watch);

// What an operator does with its arguments, by their index, at most 64.
struct OperatorTraits {
  bool views = false;        // gives views of what it gets, and reads nothing
  bool only_looks = false;   // reads no element
  bool decomposes = false;   // runs other operators, each of which is seen itself
  bool random = false;       // draws from a generator
  uint64_t tensors = 0;      // may hold tensors
  uint64_t written = 0;      // is written into, also where its schema does not say so
  uint64_t overwritten = 0;  // of these: each element, and none is read
};
const OperatorTraits& operator_traits(const c10::OperatorHandle& op);

// The backed parameter that `tensor` is, or is a view of; null for any other tensor.
BackedParameter* backed_parameter(const at::Tensor& tensor);

// Makes the parameter behind a tensor whole, for code that is about to read it by its address; no
// effect on other tensors. Gives the tensor.
const at::Tensor& whole(const at::Tensor& tensor);

}  // namespace lightning
