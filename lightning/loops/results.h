// The values that a stage has logged, reduced over batches. One collection for training, one for
// each evaluation. Logging costs no transfer: device tensors stay where they are, host scalars are
// summed on the host with the rounding a float32 tensor would have.
// Source: Lightning 2.6, `_ResultCollection`; the reference's section 7.1.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "lightning/batch.h"
#include "lightning/hooks.h"
#include "lightning/module.h"

namespace lightning {

// A scalar on the host with the dtype it was logged in, or a tensor on its device.
class Scalar {
 public:
  Scalar() = default;
  Scalar(double value, at::ScalarType dtype) : number_(value), dtype_(dtype), on_host_(true) {}
  explicit Scalar(at::Tensor tensor) : tensor_(std::move(tensor)) {}

  bool defined() const { return on_host_ || tensor_.defined(); }
  bool on_host() const { return on_host_; }
  double number() const { return number_; }
  at::ScalarType dtype() const { return on_host_ ? dtype_ : tensor_.scalar_type(); }
  at::Tensor tensor() const;  // 0-dim; made from the number where it is on the host
  double item() const;        // waits for the device where it is not on the host

 private:
  double number_ = 0;
  at::ScalarType dtype_ = at::kFloat;
  bool on_host_ = false;
  at::Tensor tensor_;
};

class ResultCollection {
 public:
  // Names and values of one kind of destination, in the order first logged.
  using Values = std::vector<std::pair<std::string, Scalar>>;
  struct Metrics {
    Values callback;
    Values log;
    Values progress_bar;
  };

  explicit ResultCollection(bool training) : training_(training) {}

  // What the values logged next belong to; `batch` may be asked for its size until it is dropped.
  void start_batch(const Batch* batch, std::optional<int64_t> dataloader_idx);
  void drop_batch();
  std::optional<int64_t> dataloader_idx() const { return dataloader_idx_; }
  void set_dataloader_idx(std::optional<int64_t> index) { dataloader_idx_ = index; }

  // Adds a value. The options are resolved: on_step and on_epoch are set.
  // Errors: MisconfigurationError for options that differ from the first call with this hook and
  // name; for a mean over the epoch when the batch holds no tensor to take its size from.
  void log(Hook hook, const std::string& name, const LogValue& value, const LogOptions& options,
           Collectives& collectives);

  // Values as of this batch (on_step), or over the epoch so far.
  Metrics metrics(bool on_step);
  // Forgets all values; names and options stay.
  void reset();
  // Forgets the values one hook logged before (a new epoch of it began).
  void reset(Hook hook);
  bool empty() const { return entries_.empty(); }
  // Whether reset() is to empty this metric.
  bool resets(const Metric& metric) const;

  // All values and counts, to go on from in another process.
  //
  //   compute      also reduces the values of metrics and of functions, which a run that resumes
  //                behind the last batch cannot: it has neither until they are logged again
  //   registered   the module's metrics, whose states are kept elsewhere
  State state_dict(bool compute, const NamedMetrics& registered);
  void load_state_dict(const State& state, const NamedMetrics& registered);

 private:
  struct Entry {
    Hook hook = Hook::none;
    std::string name;
    std::optional<int64_t> dataloader_idx;  // as it was when first logged
    LogOptions options;
    Metric* metric = nullptr;  // a Metric object's own states
    Scalar step_value;
    Scalar total;  // sum, weighted sum, minimum or maximum
    double weight = 0;
    std::vector<at::Tensor> all;  // for a function over all values
    Scalar computed;
    bool has_value = false;
    // Of an entry that was loaded: `metric` and a function in `options` come with the next log().
    bool restored = false;
    bool of_metric = false;
    std::shared_ptr<State> metric_state;  // until then; one for all entries of a metric
  };

  Entry& entry_for(Hook hook, const std::string& name, const LogValue& value,
                   const LogOptions& options);
  double weight_of_batch(const Entry& entry);
  void accumulate(Entry& entry, const Scalar& value, double weight);
  void reconnect(Entry& entry, const LogValue& value, const LogOptions& options);
  Scalar computed(Entry& entry);

  bool training_;
  const Batch* batch_ = nullptr;
  std::optional<double> batch_size_;
  std::optional<int64_t> dataloader_idx_;
  // Deque-like stability is not needed: entries are found by index. Steps log in the same order
  // each time, so the search begins after the last one found.
  std::vector<Entry> entries_;
  size_t next_ = 0;
  Collectives* collectives_ = nullptr;
};

}  // namespace lightning
