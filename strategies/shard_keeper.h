// What a sharding strategy does with a unit of parameters: each rank keeps its rows of each,
// gathers them for use, and reduces gradients to the rows' owners.
//
// A parameter of R rows on S ranks has ceil(R / S) rows on each, the last ones padded, so that one
// collective moves all parameters of a unit without a copy. A parameter without dims is a row.
//
// Shards may lie in host memory: a unit's are copied to the GPU to be gathered, and its gradients
// back once they are reduced, on streams of their own while the GPU computes. At the end of
// backward() all gradients are there.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "lightning/param/units.h"
#include "strategies/side_stream.h"

namespace c10d {
class ProcessGroup;
class Work;
}  // namespace c10d

namespace lightning {

// How a parameter's rows are cut.
struct RowsOfPart {
  int64_t each = 0;  // with the padding
  int64_t first = 0;
  int64_t count = 0;
};
RowsOfPart rows_of_part(int64_t rows, int64_t part, int64_t parts);

// This rank's part of a parameter.
struct Shard {
  BackedParameter* parameter = nullptr;
  std::vector<int64_t> sizes;  // of the whole parameter
  int64_t rows_each = 1;       // of each rank, with padding
  int64_t first_row = 0;
  int64_t rows = 0;         // of this rank; may be none
  at::Tensor padded;        // [rows_each, ...]
  at::Tensor slice;         // its first `rows`: what the optimizer steps, with its gradient
  bool is_trained = false;  // requires_grad of the parameter, as it was seen last
  at::Tensor sum;           // of gradients that were not reduced yet, of the whole parameter

  // This rank's rows of a tensor of the parameter's shape.
  at::Tensor rows_of(const at::Tensor& whole) const;
};

struct ShardKeeperOptions {
  c10::intrusive_ptr<c10d::ProcessGroup> everyone;  // null: this process is alone
  // Ranks that share a parameter, and those that have the same rows; null where it is one rank.
  c10::intrusive_ptr<c10d::ProcessGroup> sharers, replicas;
  at::Device device = at::kCPU;
  // Shards and their gradients in host memory, pinned where `device` is a GPU.
  bool on_host = false;
  // In which parameters of two and more dims are gathered; else in their own.
  std::optional<at::ScalarType> compute_dtype;
};

class ShardKeeper : public UnitKeeper {
 public:
  explicit ShardKeeper(ShardKeeperOptions options);
  ~ShardKeeper() override;

  // ---- For the strategy -------------------------------------------------------------------------

  // The values of a parameter on the meta device, before units are made of it: of which this rank's
  // rows are kept. Called by all ranks in the same order.
  void born(const at::Tensor& parameter, const at::Tensor& values);
  bool is_born(const at::Tensor& parameter) const;
  // Gives each parameter's values to another keeper, which makes its own units of them: from then
  // on they are on the meta device, and nothing is kept here. Called by all ranks.
  void hand_over(ShardKeeper& to);
  // Takes over what restore() of another keeper left with the parameter, likewise; no effect on
  // other parameters. Called by all ranks in the same order.
  // Errors: MisconfigurationError where the ranks that have the other rows are gone.
  void adopt(const at::Tensor& parameter);

  // By the module's parameter, or by its slice; null for any other tensor.
  Shard* find(const at::Tensor& parameter);
  // In the order of the units.
  const std::vector<std::unique_ptr<Shard>>& all() const { return shards_; }
  int64_t parts() const { return parts_; }
  // Of the ranks that have the same rows, the one that saves them.
  bool writes() const;

  // False: gradients are summed here until the next backward that reduces.
  void set_synchronizes(bool synchronizes) { synchronizes_ = synchronizes; }
  bool synchronizes() const { return synchronizes_; }
  // Gives slices the requires_grad of parameters where that has changed. A slice that was told by
  // its optimizer that it needs no gradient (toggle_optimizer) gets none.
  void follow_flags();
  // The GPU has read what it was given of slices: they may be written. Waits for it, where they are
  // on the host.
  void wait_for_reads() const;
  // Of gradients, on all ranks: summed over those that share parameters.
  at::Tensor sum_over_sharers(const at::Tensor& value) const;
  // What each rank has of a tensor of the parameter's shape, as a whole in the host memory of the
  // first of those that share it; undefined on the others. Called by all. Where nothing is shared,
  // the tensor itself.
  at::Tensor collect(const Shard& shard, const at::Tensor& rows) const;
  // Where each rank has everything, parameters become ordinary ones again. Else this rank's rows
  // are left with each, for another keeper to adopt().
  void restore();

  // ---- For the units ----------------------------------------------------------------------------

  BackedOptions look(const std::string& name, const at::Tensor& parameter) override;
  void take(Unit& unit) override;
  void gather(Unit& unit) override;
  void wait(Unit& unit) override;
  void release(Unit& unit) override;
  void reduce(Unit& unit, const std::vector<BackedParameter*>& arrived) override;
  void backward_end() override;
  void write_back(Unit& unit) override;
  std::string placement() const override;

 private:
  using Works = std::vector<c10::intrusive_ptr<c10d::Work>>;
  struct Gathering {
    Works works;
    std::vector<at::Tensor> inputs;                         // alive until they were sent
    std::vector<std::pair<at::Tensor, at::Tensor>> copies;  // to, from: once they are there
    std::optional<c10::Event> fetched;                      // from the host
  };
  struct Reduction {
    Works works;
    std::vector<at::Tensor> inputs, outputs;
    std::vector<Shard*> shards;
    std::optional<c10::Event> launched;  // where gradients go to the host
  };
  // Gradients on their way to the host, and what the copies read, alive until they are there.
  struct Landing {
    std::vector<std::pair<Shard*, at::Tensor>> gradients;
    Reduction reduction;
    std::vector<at::Tensor> means;
    std::optional<c10::Event> landed;
  };

  Shard& shard_of(const BackedParameter& parameter);
  void leave(const Shard& shard) const;
  // Collects a parameter's rows from `sharers`, which makes it born here.
  void collect_born(const at::Tensor& parameter, const Shard& shard,
                    const c10::intrusive_ptr<c10d::ProcessGroup>& sharers);
  // The optimizer's tensor is the gathered parameter itself.
  bool is_in_place(const Shard& shard) const;
  void make(BackedParameter& parameter, const at::Tensor& values);
  // Shape and place of this rank's part of a tensor.
  Shard part_of(const at::Tensor& whole) const;
  // This rank's rows of rank 0's values.
  at::Tensor own_rows(const Shard& shard, const at::Tensor& values) const;
  at::Tensor reduce_input(const Shard& shard, const at::Tensor& gradient) const;
  at::Tensor fetch(const Shard& shard) const;
  void start_reduction(const std::vector<std::pair<Shard*, at::Tensor>>& gradients);
  void start_collectives();
  void finish_reduction();
  // Over all ranks, of one of a reduction's gradients: this rank's rows.
  at::Tensor mean_of(const Reduction& reduction, size_t index) const;
  void bring(Reduction reduction);
  void land();

  ShardKeeperOptions options_;
  int64_t parts_ = 1, part_ = 0;
  bool synchronizes_ = true;
  std::map<std::string, at::Tensor> given_;           // parameters of the unit that is set up
  std::unordered_map<const void*, at::Tensor> born_;  // rows, by parameter
  std::vector<std::unique_ptr<Shard>> shards_;
  std::unordered_map<const void*, Shard*> by_tensor_;
  std::map<int64_t, Gathering> gatherings_;  // under way, by unit
  Reduction reduction_;                      // one is under way at most
  Landing landing_;                          // likewise
  // Both null where shards are not on the host of a GPU.
  std::unique_ptr<SideStream> from_host_, to_host_;
};

}  // namespace lightning
