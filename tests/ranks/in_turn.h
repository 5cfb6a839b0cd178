// A run of several ranks beside one process that takes their batches in turn.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/randn.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "lightning.h"
#include "lightning/data/distributed_sampler.h"
#include "precision/mixed.h"
#include "tests/support/ranks.h"

namespace lightning::testing {

constexpr int64_t kRows = 48;
constexpr int64_t kBatch = 3;  // of a rank

// The samples of all ranks as one process takes them: a batch of each rank in turn. Their order is
// DistributedSampler's.
class InTurn : public Sampler {
 public:
  explicit InTurn(int64_t ranks) : ranks_(ranks) {}
  IndexStream iterate() override {
    std::vector<int64_t> order;
    DistributedSampler all(kRows, {1, 0, true, 0, false});
    all.set_epoch(epoch_);
    const auto next = all.iterate();
    while (const auto index = next()) order.push_back(*index);
    std::vector<int64_t> turned;
    for (int64_t batch = 0; batch * kBatch * ranks_ < kRows; ++batch) {
      for (int64_t rank = 0; rank < ranks_; ++rank) {
        for (int64_t i = 0; i < kBatch; ++i) {
          turned.push_back(order[static_cast<size_t>((batch * kBatch + i) * ranks_ + rank)]);
        }
      }
    }
    return [turned, place = size_t{0}]() mutable {
      return place < turned.size() ? std::optional<int64_t>(turned[place++]) : std::nullopt;
    };
  }
  std::optional<int64_t> size() const override { return kRows; }
  void set_epoch(int64_t epoch) override { epoch_ = epoch; }

 private:
  int64_t ranks_;
  int64_t epoch_ = 0;
};

// Random rows [kRows, width], the same each time; null: in the order of the strategy.
inline DataLoader rows_of(int64_t width, std::shared_ptr<Sampler> sampler, int64_t batch = kBatch) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(3);
  DataLoaderOptions options(batch);
  if (sampler != nullptr) options.sampler(std::move(sampler));
  return DataLoader(TensorDataset(Batch(at::randn({kRows, width}, generator))), options);
}

inline TrainerOptions options(const std::string& dir) {
  return TrainerOptions()
      .accelerator(Ranks::accelerator())
      .max_epochs(2)
      .logger(false)
      .enable_progress_bar(false)
      .enable_model_summary(false)
      .enable_checkpointing(false)
      .num_sanity_val_steps(1)
      .default_root_dir(dir);
}

// float16 with a scaler, on a CPU too. The gradients of a rank are larger than those of one
// process, which divides its loss, and overflow before them: not with this scale.
inline std::shared_ptr<MixedPrecision> half_mixed(int64_t growth_interval = 2000) {
  const auto options = GradScalerOptions().init_scale(1024).growth_interval(growth_interval);
  return std::make_shared<MixedPrecision>("16-mixed", std::make_shared<GradScaler>(options));
}

template <class Config>
TrainerOptions configured(const Config& config, const std::string& dir) {
  auto flags = options(dir);
  if (config.precision == "16-mixed") {
    flags.plugins({half_mixed()});
  } else {
    flags.precision(config.precision);
  }
  if (config.clip > 0) {
    flags.gradient_clip_val(config.clip).gradient_clip_algorithm(config.clip_algorithm);
  }
  return flags;
}

inline std::string file_of(const std::string& folder, const std::string& name) {
  return folder + "/" + name + ".pt";
}

}  // namespace lightning::testing
