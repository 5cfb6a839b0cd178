#include "lightning/data/distributed_sampler.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Functions.h>

#include <utility>
#include <vector>

#include "lightning/errors.h"

namespace lightning {
namespace {

void check_rank(const char* who, int64_t num_replicas, int64_t rank) {
  if (num_replicas >= 1 && rank >= 0 && rank < num_replicas) return;
  throw MisconfigurationError(str(who, " got rank ", rank, " of ", num_replicas,
                                  " replicas, expected a rank from 0 to ", num_replicas - 1, "."));
}

int64_t known_size(const std::optional<int64_t>& size, const char* what) {
  if (size) return *size;
  throw MisconfigurationError(
      str("A ", what,
          " without a size cannot be shared out among processes. Give it a size(), or "
          "share out yourself and set use_distributed_sampler to false."));
}

// With drop_last, ceil((size - replicas) / replicas) where it does not divide.
int64_t samples_per_rank(int64_t size, int64_t replicas, bool drop_last) {
  return drop_last ? size / replicas : (size + replicas - 1) / replicas;
}

}  // namespace

DistributedSampler::DistributedSampler(int64_t size, DistributedSamplerOptions options)
    : size_(size),
      options_(options),
      num_samples_(samples_per_rank(size, options.num_replicas, options.drop_last)) {
  check_rank("DistributedSampler", options_.num_replicas, options_.rank);
}

// Places beyond the size stand for the order from its beginning: the padding.
IndexStream DistributedSampler::iterate() {
  at::Tensor order;
  if (options_.shuffle) {
    at::Generator generator = at::detail::createCPUGenerator();
    generator.set_current_seed(options_.seed + static_cast<uint64_t>(epoch_));
    order = at::randperm(size_, generator, at::TensorOptions(at::kLong));
  }
  return [order, size = size_, place = options_.rank, step = options_.num_replicas,
          left = size_ > 0 ? num_samples_ : 0]() mutable {
    if (left-- <= 0) return std::optional<int64_t>();
    const int64_t index = place % size;
    place += step;
    return std::optional<int64_t>(order.defined() ? order.const_data_ptr<int64_t>()[index] : index);
  };
}

State DistributedSampler::state_dict() const { return State::dict({{"epoch", epoch_}}); }

void DistributedSampler::load_state_dict(const State& state) {
  epoch_ = state.at("epoch").as_int();
}

DistributedSamplerWrapper::DistributedSamplerWrapper(std::shared_ptr<Sampler> sampler,
                                                     DistributedSamplerOptions options, bool repeat)
    : sampler_(std::move(sampler)), options_(options), repeat_(repeat) {
  check_rank("DistributedSamplerWrapper", options_.num_replicas, options_.rank);
  known_size(sampler_->size(), "sampler");
}

IndexStream DistributedSamplerWrapper::iterate() {
  std::vector<int64_t> order;
  const IndexStream all = sampler_->iterate();
  while (const auto index = all()) order.push_back(*index);
  if (!repeat_) {
    return [order = std::move(order), place = static_cast<size_t>(options_.rank),
            step = static_cast<size_t>(options_.num_replicas)]() mutable {
      if (place >= order.size()) return std::optional<int64_t>();
      const int64_t index = order[place];
      place += step;
      return std::optional<int64_t>(index);
    };
  }
  DistributedSampler places(static_cast<int64_t>(order.size()), options_);
  places.set_epoch(epoch_);
  return [order = std::move(order), next = places.iterate()] {
    const auto place = next();
    return place ? std::optional<int64_t>(order[*place]) : std::nullopt;
  };
}

std::optional<int64_t> DistributedSamplerWrapper::size() const {
  const int64_t size = known_size(sampler_->size(), "sampler");
  if (repeat_) return samples_per_rank(size, options_.num_replicas, options_.drop_last);
  return (size - options_.rank + options_.num_replicas - 1) / options_.num_replicas;
}

void DistributedSamplerWrapper::set_epoch(int64_t epoch) {
  epoch_ = epoch;
  sampler_->set_epoch(epoch);
}

State DistributedSamplerWrapper::state_dict() const {
  return State::dict({{"epoch", epoch_}, {"sampler", sampler_->state_dict()}});
}

void DistributedSamplerWrapper::load_state_dict(const State& state) {
  epoch_ = state.at("epoch").as_int();
  sampler_->load_state_dict(state.at("sampler"));
}

DistributedBatchSampler::DistributedBatchSampler(std::shared_ptr<BatchSamplerBase> batches,
                                                 SamplerArguments share, bool repeat)
    : batches_(std::move(batches)), share_(share), repeat_(repeat) {
  check_rank("DistributedBatchSampler", share_.num_replicas, share_.rank);
  known_size(batches_->size(), "batch sampler");
}

// Reads one round of batches (one for each rank) at a time; the first round is kept for the
// padding.
BatchIndexStream DistributedBatchSampler::iterate() {
  using Batches = std::vector<std::vector<int64_t>>;
  return [next = batches_->iterate(), share = share_, repeat = repeat_, first = Batches(),
          ended = false](std::vector<int64_t>& indices) mutable {
    Batches round;
    while (!ended && static_cast<int64_t>(round.size()) < share.num_replicas) {
      ended = !next(indices);
      if (!ended) round.push_back(indices);
    }
    if (round.empty()) return false;
    if (first.empty()) first = round;
    const auto rank = static_cast<size_t>(share.rank);
    if (rank < round.size()) {
      indices = std::move(round[rank]);
      return true;
    }
    if (repeat) indices = first[(rank - round.size()) % first.size()];
    return repeat;
  };
}

std::optional<int64_t> DistributedBatchSampler::size() const {
  const int64_t size = known_size(batches_->size(), "batch sampler");
  return (size + share_.num_replicas - 1 - (repeat_ ? 0 : share_.rank)) / share_.num_replicas;
}

}  // namespace lightning
