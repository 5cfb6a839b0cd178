// Each process's share of the data.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "lightning/data/sampler.h"
#include "lightning/distributed/collectives.h"

namespace lightning {

struct DistributedSamplerOptions {
  int64_t num_replicas = 1;
  int64_t rank = 0;
  bool shuffle = true;
  uint64_t seed = 0;       // the order's seed is seed + epoch, equal on all ranks
  bool drop_last = false;  // leave out the tail that does not divide, instead of repeating samples
};

// Every num_replicas-th index, from `rank`. All ranks give the same number: where the size does not
// divide, the first samples come again at the end. `set_epoch` gives each epoch its order.
// Errors: MisconfigurationError for a rank outside [0, num_replicas).
// Source: torch 2.11, `DistributedSampler`, index for index.
class DistributedSampler : public Sampler {
 public:
  DistributedSampler(int64_t size, DistributedSamplerOptions options);
  IndexStream iterate() override;
  std::optional<int64_t> size() const override { return num_samples_; }
  void set_epoch(int64_t epoch) override { epoch_ = epoch; }
  bool shuffles() const override { return options_.shuffle; }
  int64_t rank() const { return options_.rank; }
  State state_dict() const override;
  void load_state_dict(const State& state) override;

 private:
  int64_t size_;
  DistributedSamplerOptions options_;
  int64_t num_samples_;
  int64_t epoch_ = 0;
};

// Shares out what another sampler gives, whose order must be the same on all ranks.
//   repeat   true pads as DistributedSampler does (shuffle, seed and drop_last as there); false
//   gives
//            every sample once, in order, ranks differing by one at most: for prediction
// Errors: MisconfigurationError where the sampler's size is not known.
// Source: Lightning 2.6, `DistributedSamplerWrapper`, `UnrepeatedDistributedSamplerWrapper`.
class DistributedSamplerWrapper : public Sampler {
 public:
  DistributedSamplerWrapper(std::shared_ptr<Sampler> sampler, DistributedSamplerOptions options,
                            bool repeat = true);
  IndexStream iterate() override;
  std::optional<int64_t> size() const override;
  void set_epoch(int64_t epoch) override;
  bool shuffles() const override { return sampler_->shuffles(); }
  int64_t rank() const { return options_.rank; }
  State state_dict() const override;
  void load_state_dict(const State& state) override;

 private:
  std::shared_ptr<Sampler> sampler_;
  DistributedSamplerOptions options_;
  bool repeat_;
  int64_t epoch_ = 0;
};

// Shares out whole batches of a batch sampler, which must be the same on all ranks.
//   repeat   true gives all ranks the same number, the first batches coming again; false gives
//   every
//            batch once
// Errors: MisconfigurationError where the number of batches is not known.
class DistributedBatchSampler : public BatchSamplerBase {
 public:
  DistributedBatchSampler(std::shared_ptr<BatchSamplerBase> batches, SamplerArguments share,
                          bool repeat = true);
  BatchIndexStream iterate() override;
  std::optional<int64_t> size() const override;
  void set_epoch(int64_t epoch) override { batches_->set_epoch(epoch); }
  bool shuffles() const override { return batches_->shuffles(); }
  State state_dict() const override { return batches_->state_dict(); }
  void load_state_dict(const State& state) override { batches_->load_state_dict(state); }

 private:
  std::shared_ptr<BatchSamplerBase> batches_;
  SamplerArguments share_;
  bool repeat_;
};

}  // namespace lightning
