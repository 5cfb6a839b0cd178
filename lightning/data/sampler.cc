#include "lightning/data/sampler.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Functions.h>

#include <algorithm>

#include "lightning/data/worker.h"
#include "lightning/errors.h"

namespace lightning {
namespace {

at::Generator seeded(uint64_t seed) {
  at::Generator generator = at::detail::createCPUGenerator();
  generator.set_current_seed(seed);
  return generator;
}

at::Tensor permutation(int64_t size, const at::Generator& generator) {
  return at::randperm(size, generator, at::TensorOptions(at::kLong));
}

// The elements of an int64 vector, one after another.
IndexStream elements(at::Tensor indices) {
  return [indices, next = indices.const_data_ptr<int64_t>(),
          end = indices.const_data_ptr<int64_t>() + indices.numel()]() mutable {
    return next == end ? std::optional<int64_t>() : *next++;
  };
}

void require_positive(const char* who, const char* what, int64_t value) {
  if (value >= 1) return;
  throw MisconfigurationError(str(who, " got ", what, " ", value, ", expected at least 1."));
}

}  // namespace

IndexStream SequentialSampler::iterate() {
  return [next = int64_t{0}, end = size_]() mutable {
    return next == end ? std::optional<int64_t>() : next++;
  };
}

void PassGenerator::set_epoch(int64_t epoch) {
  if (epoch != epoch_) restored_ = false;
  if (!restored_) passes_ = 0;
  epoch_ = epoch;
}

at::Generator PassGenerator::next(bool fork) {
  if (restored_) {
    restored_ = false;
    if (state_.at("seed").is<int64_t>()) {
      return seeded(static_cast<uint64_t>(state_.at("seed").as_int()));
    }
    at::Generator generator = at::detail::createCPUGenerator();
    generator.set_state(state_.at("seed").as_tensor());
    return generator;
  }
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  uint64_t seed = 0;
  if (seed_) {
    seed = passes_ == 0
               ? *seed_ + static_cast<uint64_t>(epoch_)
               : mix_seed(*seed_, static_cast<uint64_t>(epoch_), static_cast<uint64_t>(passes_));
  } else if (fork) {
    seed = static_cast<uint64_t>(at::empty({}, at::kLong).random_().item<int64_t>());
  }
  ++passes_;
  const bool own = seed_ || fork;
  state_ = State::dict(
      {{"epoch", epoch_},
       {"passes", passes_},
       {"seed", own ? State(static_cast<int64_t>(seed)) : State(generator.get_state())}});
  return own ? seeded(seed) : generator;
}

void PassGenerator::load_state_dict(const State& state) {
  state_ = state;
  restored_ = !state.empty();
  if (!restored_) return;
  epoch_ = state.at("epoch").as_int();
  passes_ = state.at("passes").as_int();
}

RandomSampler::RandomSampler(int64_t size, std::optional<uint64_t> seed, bool replacement,
                             std::optional<int64_t> num_samples)
    : size_(size),
      replacement_(replacement),
      num_samples_(num_samples.value_or(size)),
      generator_(seed) {
  require_positive("RandomSampler", "a data set of size", size_);
  require_positive("RandomSampler", "num_samples", num_samples_);
}

// With replacement Python draws 32 at a time, and so in the same order as all at once.
IndexStream RandomSampler::iterate() {
  at::Generator generator = generator_.next(/*fork=*/true);
  if (replacement_) {
    return elements(at::randint(size_, {num_samples_}, generator, at::TensorOptions(at::kLong)));
  }
  if (num_samples_ <= size_) {
    if (num_samples_ == size_) return elements(permutation(size_, generator));
    return elements(permutation(size_, generator).slice(0, 0, num_samples_).contiguous());
  }
  std::vector<at::Tensor> rounds;
  for (int64_t left = num_samples_; left > 0; left -= size_) {
    rounds.push_back(permutation(size_, generator).slice(0, 0, std::min(left, size_)));
  }
  return elements(at::cat(rounds));
}

SubsetRandomSampler::SubsetRandomSampler(std::vector<int64_t> indices, std::optional<uint64_t> seed)
    : indices_(std::move(indices)), generator_(seed) {}

IndexStream SubsetRandomSampler::iterate() {
  const auto count = static_cast<int64_t>(indices_.size());
  return [this, places = elements(permutation(count, generator_.next(/*fork=*/false)))] {
    const auto place = places();
    return place ? indices_[*place] : std::optional<int64_t>();
  };
}

WeightedRandomSampler::WeightedRandomSampler(const at::Tensor& weights, int64_t num_samples,
                                             bool replacement, std::optional<uint64_t> seed)
    : weights_(weights.to(at::kCPU, at::kDouble)),
      num_samples_(num_samples),
      replacement_(replacement),
      generator_(seed) {
  require_positive("WeightedRandomSampler", "num_samples", num_samples_);
  if (weights_.dim() != 1) {
    throw MisconfigurationError(str("WeightedRandomSampler got weights with ", weights_.dim(),
                                    " dims, expected a vector with a weight for each sample."));
  }
}

WeightedRandomSampler::WeightedRandomSampler(const std::vector<double>& weights,
                                             int64_t num_samples, bool replacement,
                                             std::optional<uint64_t> seed)
    : WeightedRandomSampler(at::tensor(weights, at::kDouble), num_samples, replacement, seed) {}

IndexStream WeightedRandomSampler::iterate() {
  return elements(
      at::multinomial(weights_, num_samples_, replacement_, generator_.next(/*fork=*/false)));
}

BatchSampler::BatchSampler(std::shared_ptr<Sampler> sampler, int64_t batch_size, bool drop_last)
    : sampler_(std::move(sampler)), batch_size_(batch_size), drop_last_(drop_last) {
  require_positive("BatchSampler", "batch_size", batch_size_);
}

BatchIndexStream BatchSampler::iterate() {
  return [next = sampler_->iterate(), batch_size = static_cast<size_t>(batch_size_),
          drop_last = drop_last_, ended = false](std::vector<int64_t>& indices) mutable {
    indices.clear();
    while (!ended && indices.size() < batch_size) {
      const auto index = next();
      ended = !index;
      if (index) indices.push_back(*index);
    }
    return indices.size() == batch_size || (!indices.empty() && !drop_last);
  };
}

std::optional<int64_t> BatchSampler::size() const {
  const auto samples = sampler_->size();
  if (!samples) return std::nullopt;
  return (*samples + (drop_last_ ? 0 : batch_size_ - 1)) / batch_size_;
}

std::shared_ptr<BatchSamplerBase> BatchSampler::keep_last() const {
  if (!drop_last_) return nullptr;
  return std::make_shared<BatchSampler>(sampler_, batch_size_, false);
}

std::shared_ptr<BatchSamplerBase> BatchSampler::with_sampler(
    std::shared_ptr<Sampler> sampler) const {
  return std::make_shared<BatchSampler>(std::move(sampler), batch_size_, drop_last_);
}

// An endless batch sampler is kept as it comes, pass after pass.
BatchIndexStream RepeatedBatchSampler::iterate() {
  if (batches_ == nullptr) batches_ = std::make_shared<Kept>(Kept{first_->iterate(), {}});
  return [kept = batches_, next = size_t{0}](std::vector<int64_t>& indices) mutable {
    if (next == kept->batches.size() && kept->more) {
      if (kept->more(indices)) {
        kept->batches.push_back(indices);
      } else {
        kept->more = nullptr;
      }
    }
    if (next == kept->batches.size()) return false;
    indices = kept->batches[next++];
    return true;
  };
}

}  // namespace lightning
