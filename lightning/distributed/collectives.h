// What the processes of a run can do together. The defaults are those of a single process.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "lightning/checkpoint/state.h"

namespace lightning {

enum class ReduceOp { kMean, kSum, kMin, kMax };

// Where a data loader of this process takes its share: of the data axis only.
struct SamplerArguments {
  int64_t num_replicas = 1;
  int64_t rank = 0;
};

class Collectives {
 public:
  virtual ~Collectives() = default;

  virtual int64_t world_size() const { return 1; }
  virtual int64_t global_rank() const { return 0; }
  bool is_global_zero() const { return global_rank() == 0; }

  // Elementwise over all processes; the tensor itself on a single one.
  virtual at::Tensor reduce(const at::Tensor& tensor, ReduceOp) { return tensor; }
  // [world, ...] with a leading dim over processes; unchanged on a single one. Same shape on all.
  virtual at::Tensor all_gather(const at::Tensor& tensor) { return tensor; }
  // The rows of all processes one after another; dim 0 may differ between them.
  virtual at::Tensor all_gather_rows(const at::Tensor& tensor) { return tensor; }
  // Trees of plain values and tensors of the host; what `value` is on other ranks does not matter.
  virtual State broadcast(State value, int64_t /*source_rank*/ = 0) { return value; }
  // The values of all processes, by rank.
  virtual std::vector<State> all_gather_states(State value) { return {std::move(value)}; }
  virtual void barrier(const std::string& /*name*/ = "") {}
  // A barrier without the limit of time that collectives have, for work of one process that may
  // take hours: a download. `name` says in errors what was waited for.
  virtual void wait_for_all(const std::string& /*name*/) {}

  // True where it holds on any, or on all processes.
  virtual bool reduce_any(bool value) { return value; }
  virtual bool reduce_all(bool value) { return value; }
};

}  // namespace lightning
