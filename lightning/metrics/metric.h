// A quantity gathered over many batches. `update` adds a batch, `compute` gives the value over all
// of them, `reset` starts anew; over several processes `compute_synced` makes the states global
// first. Not thread-safe; updates do not wait for the device.
//
// A metric of one's own declares its states and works on them in place:
//
//   struct Sum : lightning::Metric {
//     Sum() { add_state("sum", at::zeros({}), Reduction::kSum); }
//     void update(const at::Tensor& values, const at::Tensor&) override { state(0) += values.sum();
//     } at::Tensor compute() const override { return state(0).clone(); }
//   };
//
// Source: torchmetrics, `Metric`; values are equal to it in tests.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "lightning/checkpoint/state.h"
#include "lightning/distributed/collectives.h"

namespace lightning {

class Metric {
 public:
  virtual ~Metric() = default;

  // Metrics of predictions and targets take both; Mean takes values and, if wanted, weights.
  virtual void update(const at::Tensor& first, const at::Tensor& second = {}) = 0;
  // From the states gathered so far.
  virtual at::Tensor compute() const = 0;

  void reset();

  // Adds a batch and gives the value over this batch alone, which `log(..., on_step)` shows. The
  // batch is looked at once: its states are gathered on their own and then join the rest. When
  // `update` or `compute` throws, the states are as before.
  at::Tensor forward(const at::Tensor& first, const at::Tensor& second = {});
  at::Tensor operator()(const at::Tensor& first, const at::Tensor& second = {}) {
    return forward(first, second);
  }
  // What forward() gave last; undefined before.
  const at::Tensor& batch_value() const { return batch_value_; }

  // The value over all processes; the local states stay as they are. All processes call it; one
  // that saw no batch contributes its initial states.
  at::Tensor compute_synced(Collectives& collectives);

  // {name: tensor, or list of tensors for a state that grows}.
  State state_dict() const;
  // Errors: CheckpointError for a missing or unknown state or a kCat state that is no list; the
  // states are then as before.
  void load_state_dict(const State& state);
  // Adds what was gathered before, in a part of the epoch that this object has not seen.
  // Errors: as load_state_dict().
  void join_state_dict(const State& earlier);
  // States move to the device of the first batch by themselves, if `update` calls follow() or is
  // called through forward().
  void to(at::Device device);

 protected:
  enum class Reduction { kSum, kMin, kMax, kCat };

  // Declares a state: its name, its value after reset, and how those of several processes become
  // one. Returns its index for state(), counted from 0.
  //
  //   initial   for kCat, a tensor without rows ([0], [0, classes]): what a process without data
  //             contributes
  size_t add_state(std::string name, at::Tensor initial, Reduction reduction);

  // To be worked on in place, so that the step can be captured in a graph. Errors: std::logic_error
  // for a kCat state.
  at::Tensor& state(size_t index);
  const at::Tensor& state(size_t index) const;

  // kCat states: adds rows (detached, not copied); all rows so far.
  void append(size_t index, const at::Tensor& values);
  at::Tensor cat(size_t index) const;

  // Moves the states to where `input` is. Each `update` calls it first.
  void follow(const at::Tensor& input);

 private:
  struct Entry {
    std::string name;
    at::Tensor initial;
    Reduction reduction;
    at::Tensor value;
    std::vector<at::Tensor> list;

    void reset();  // by a value of its own, so that earlier ones stay
  };
  static void merge(Entry& into, Entry& batch);
  void load_entry(Entry& entry, const State& saved) const;
  std::vector<Entry> loaded_entries(const State& state) const;

  std::vector<Entry> entries_;
  at::Tensor batch_value_;
};

}  // namespace lightning
