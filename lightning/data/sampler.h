// The order in which a loader takes samples.
//
// A sampler gives one pass after another. Where an order is random it is a function of the seed and
// the epoch; without a seed each pass draws one from LibTorch's default generator, so that
// `torch::manual_seed` fixes it. Orders are equal to those of Python's samplers under one seed.
// Samplers are used on the thread that iterates the loader.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "lightning/checkpoint/state.h"

namespace lightning {

// The next index, or nullopt at the end.
using IndexStream = std::function<std::optional<int64_t>()>;
// Fills in the indices of the next batch; false at the end.
using BatchIndexStream = std::function<bool(std::vector<int64_t>& indices)>;

class Sampler {
 public:
  virtual ~Sampler() = default;

  // Begins a pass. The sampler outlives the stream.
  virtual IndexStream iterate() = 0;
  // Indices in one pass; nullopt when not known.
  virtual std::optional<int64_t> size() const = 0;
  // The epoch of the passes that follow.
  virtual void set_epoch(int64_t /*epoch*/) {}
  // Is this the random order of a shuffling loader?
  virtual bool shuffles() const { return false; }

  // What gives the order of the pass that iterate() began last once more: after load_state_dict the
  // next iterate() does. A sampler whose order is always the same has none.
  virtual State state_dict() const { return {}; }
  virtual void load_state_dict(const State&) {}
};

class SequentialSampler : public Sampler {
 public:
  explicit SequentialSampler(int64_t size) : size_(size) {}
  IndexStream iterate() override;
  std::optional<int64_t> size() const override { return size_; }

 private:
  int64_t size_;
};

// The generator of a random sampler: seeded with seed + epoch, or from the default generator.
// A second pass in one epoch (no set_epoch in between) has an order of its own.
class PassGenerator {
 public:
  explicit PassGenerator(std::optional<uint64_t> seed) : seed_(seed) {}

  // For the next pass.
  //   fork   without a seed: true draws a seed from the default generator, as RandomSampler does;
  //          false gives the default generator itself
  at::Generator next(bool fork);
  void set_epoch(int64_t epoch);
  State state_dict() const { return state_; }
  void load_state_dict(const State& state);

 private:
  std::optional<uint64_t> seed_;
  int64_t epoch_ = 0;
  int64_t passes_ = 0;  // begun in this epoch
  bool restored_ = false;
  State state_;  // of the pass begun last, or restored
};

// Source: torch 2.11, `RandomSampler`.
class RandomSampler : public Sampler {
 public:
  //   num_samples   nullopt: size. Without replacement, more than size goes round again.
  // Errors: MisconfigurationError for a size or a num_samples below one.
  explicit RandomSampler(int64_t size, std::optional<uint64_t> seed = std::nullopt,
                         bool replacement = false,
                         std::optional<int64_t> num_samples = std::nullopt);
  IndexStream iterate() override;
  std::optional<int64_t> size() const override { return num_samples_; }
  void set_epoch(int64_t epoch) override { generator_.set_epoch(epoch); }
  bool shuffles() const override { return true; }
  State state_dict() const override { return generator_.state_dict(); }
  void load_state_dict(const State& state) override { generator_.load_state_dict(state); }

 private:
  int64_t size_;
  bool replacement_;
  int64_t num_samples_;
  PassGenerator generator_;
};

// Source: torch 2.11, `SubsetRandomSampler`.
class SubsetRandomSampler : public Sampler {
 public:
  explicit SubsetRandomSampler(std::vector<int64_t> indices,
                               std::optional<uint64_t> seed = std::nullopt);
  IndexStream iterate() override;
  std::optional<int64_t> size() const override { return static_cast<int64_t>(indices_.size()); }
  void set_epoch(int64_t epoch) override { generator_.set_epoch(epoch); }
  State state_dict() const override { return generator_.state_dict(); }
  void load_state_dict(const State& state) override { generator_.load_state_dict(state); }

 private:
  std::vector<int64_t> indices_;
  PassGenerator generator_;
};

// Index i with probability weights[i] / sum. Source: torch 2.11, `WeightedRandomSampler`.
class WeightedRandomSampler : public Sampler {
 public:
  // Errors: MisconfigurationError for weights that are not a vector, or num_samples below one.
  WeightedRandomSampler(const at::Tensor& weights, int64_t num_samples, bool replacement = true,
                        std::optional<uint64_t> seed = std::nullopt);
  WeightedRandomSampler(const std::vector<double>& weights, int64_t num_samples,
                        bool replacement = true, std::optional<uint64_t> seed = std::nullopt);
  IndexStream iterate() override;
  std::optional<int64_t> size() const override { return num_samples_; }
  void set_epoch(int64_t epoch) override { generator_.set_epoch(epoch); }
  State state_dict() const override { return generator_.state_dict(); }
  void load_state_dict(const State& state) override { generator_.load_state_dict(state); }

 private:
  at::Tensor weights_;  // float64 [size]
  int64_t num_samples_;
  bool replacement_;
  PassGenerator generator_;
};

// Indices in groups, a batch each: what a batch sampler of the user's derives from.
class BatchSamplerBase {
 public:
  virtual ~BatchSamplerBase() = default;

  virtual BatchIndexStream iterate() = 0;
  // Batches in one pass; nullopt when not known.
  virtual std::optional<int64_t> size() const = 0;
  virtual void set_epoch(int64_t /*epoch*/) {}
  virtual bool shuffles() const { return false; }
  virtual State state_dict() const { return {}; }  // as a Sampler's
  virtual void load_state_dict(const State&) {}

  // The same with the last, incomplete batch kept, for prediction; null where nothing is dropped.
  virtual std::shared_ptr<BatchSamplerBase> keep_last() const { return nullptr; }
  // The same over another order of samples. Null where there is no sampler inside: processes then
  // share out whole batches, and overfit_batches repeats those of the first pass.
  virtual std::shared_ptr<BatchSamplerBase> with_sampler(std::shared_ptr<Sampler>) const {
    return nullptr;
  }
  virtual std::shared_ptr<Sampler> sampler() const { return nullptr; }
};

// Source: torch 2.11, `BatchSampler`.
class BatchSampler : public BatchSamplerBase {
 public:
  // Errors: MisconfigurationError for a batch_size below one.
  BatchSampler(std::shared_ptr<Sampler> sampler, int64_t batch_size, bool drop_last = false);

  BatchIndexStream iterate() override;
  std::optional<int64_t> size() const override;
  void set_epoch(int64_t epoch) override { sampler_->set_epoch(epoch); }
  bool shuffles() const override { return sampler_->shuffles(); }
  State state_dict() const override { return sampler_->state_dict(); }
  void load_state_dict(const State& state) override { sampler_->load_state_dict(state); }

  std::shared_ptr<BatchSamplerBase> keep_last() const override;
  std::shared_ptr<BatchSamplerBase> with_sampler(std::shared_ptr<Sampler> sampler) const override;
  std::shared_ptr<Sampler> sampler() const override { return sampler_; }
  int64_t batch_size() const { return batch_size_; }
  bool drop_last() const { return drop_last_; }

 private:
  std::shared_ptr<Sampler> sampler_;
  int64_t batch_size_;
  bool drop_last_;
};

// The batches of another batch sampler's first pass, the same in each pass: overfit_batches over a
// batch sampler whose order cannot be replaced.
class RepeatedBatchSampler : public BatchSamplerBase {
 public:
  explicit RepeatedBatchSampler(std::shared_ptr<BatchSamplerBase> first)
      : first_(std::move(first)) {}
  BatchIndexStream iterate() override;
  std::optional<int64_t> size() const override { return first_->size(); }
  State state_dict() const override { return first_->state_dict(); }
  void load_state_dict(const State& state) override { first_->load_state_dict(state); }

 private:
  std::shared_ptr<BatchSamplerBase> first_;
  struct Kept {
    BatchIndexStream more;  // of the first pass; null when it has ended
    std::vector<std::vector<int64_t>> batches;
  };
  std::shared_ptr<Kept> batches_;
};

}  // namespace lightning
