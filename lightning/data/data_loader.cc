#include "lightning/data/data_loader.h"

#include <ATen/Functions.h>
#include <ATen/detail/CUDAHooksInterface.h>

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "lightning/data/distributed_sampler.h"
#include "lightning/data/loader_pass.h"
#include "lightning/errors.h"

namespace lightning {

struct DataLoader::Impl {
  LoadPlan plan;  // what the next pass loads
  DataLoaderOptions options;

  // What the loops asked for, on top of the options.
  bool sequential = false;
  bool predict = false;
  std::optional<SamplerArguments> share;
  bool share_shuffles = false;

  int64_t epoch = 0;
  int64_t passes = 0;                       // begun in this epoch
  std::optional<uint64_t> persistent_seed;  // drawn once for persistent workers
  std::shared_ptr<LoadPlace> place;         // of the pass begun last
  std::shared_ptr<LoadPlace> restored;      // where the next pass begins
  std::shared_ptr<LoadWorkers> persistent;

  std::optional<int64_t> size() const;
  std::shared_ptr<BatchSamplerBase> make_batches() const;
  std::shared_ptr<Sampler> make_order() const;
  std::shared_ptr<Sampler> make_share(const std::shared_ptr<Sampler>& order) const;
  uint64_t draw_base_seed();
  std::shared_ptr<LoadWorkers> workers();
};

namespace {

[[noreturn]] void refuse(const std::string& what) {
  throw MisconfigurationError("DataLoader got " + what);
}

void check(const DataLoaderOptions& options, bool is_stream) {
  const auto& batch_size = options.batch_size();
  if (batch_size && *batch_size < 1) {
    refuse(str("batch_size ", *batch_size, ", expected at least 1, or null for single samples."));
  }
  if (options.num_workers() < 0) {
    refuse(str("num_workers ", options.num_workers(),
               ", expected 0 (the caller's thread loads) or more."));
  }
  if (options.timeout_s() < 0) {
    refuse(str("timeout_s ", options.timeout_s(), ", expected 0 (no limit) or more."));
  }
  if (options.prefetch_factor() && *options.prefetch_factor() < 1) {
    refuse(str("prefetch_factor ", *options.prefetch_factor(), ", expected at least 1."));
  }
  if (options.num_workers() == 0) {
    const char* useless = options.prefetch_factor()      ? "prefetch_factor"
                          : options.persistent_workers() ? "persistent_workers"
                          : options.timeout_s() > 0      ? "timeout_s"
                          : options.worker_init_fn()     ? "worker_init_fn"
                                                         : nullptr;
    if (useless != nullptr) {
      refuse(str(useless,
                 " without workers to apply it to. Set num_workers to 1 or more, or leave ",
                 useless, " out."));
    }
  }
  if (is_stream && (options.shuffle() || options.sampler() || options.batch_sampler())) {
    refuse(str(options.shuffle() ? "shuffle" : "a sampler",
               " for a StreamDataset, whose samples have no indices. Shuffle inside the stream."));
  }
  if (options.shuffle() && options.sampler()) {
    refuse("shuffle and a sampler, which exclude each other. The sampler sets the order.");
  }
  if (options.drop_last() && !batch_size) {
    refuse("drop_last without a batch_size. Single samples leave nothing to drop.");
  }
  if (!options.batch_sampler()) return;
  const char* twice = batch_size != int64_t{1} ? "batch_size"
                      : options.shuffle()      ? "shuffle"
                      : options.sampler()      ? "sampler"
                      : options.drop_last()    ? "drop_last"
                                               : nullptr;
  if (twice != nullptr) {
    refuse(str("a batch_sampler and ", twice, ". The batch sampler makes the batches: leave ",
               twice, " out."));
  }
}

LoadPlan make_plan(const DataLoaderOptions& options) {
  LoadPlan plan;
  plan.batch_size = options.batch_size();
  plan.drop_last = options.drop_last();
  plan.collate_fn = options.collate_fn();
  plan.worker_init_fn = options.worker_init_fn();
  plan.pin_memory = options.pin_memory() && at::detail::getCUDAHooks().deviceCount() > 0;
  plan.num_workers = options.num_workers();
  plan.prefetch_factor = options.prefetch_factor().value_or(2);
  plan.timeout_s = options.timeout_s();
  return plan;
}

std::optional<uint64_t> seed_of(const DataLoaderOptions& options) {
  if (!options.seed()) return std::nullopt;
  return static_cast<uint64_t>(*options.seed());
}

// Equal on all ranks. Source: Lightning 2.6, `_get_distributed_sampler`.
uint64_t shared_seed(const DataLoaderOptions& options) {
  if (options.seed()) return static_cast<uint64_t>(*options.seed());
  const char* global = std::getenv("PL_GLOBAL_SEED");
  return global == nullptr ? 0 : std::strtoull(global, nullptr, 10);
}

// Of a distributed sampler.
std::optional<int64_t> rank_of(const std::shared_ptr<Sampler>& sampler) {
  if (const auto* shared = dynamic_cast<const DistributedSampler*>(sampler.get())) {
    return shared->rank();
  }
  if (const auto* shared = dynamic_cast<const DistributedSamplerWrapper*>(sampler.get())) {
    return shared->rank();
  }
  return std::nullopt;
}

State to_state(const LoadPlace& place, std::optional<int64_t> size) {
  State state = State::dict({{"epoch", place.epoch},
                             {"passes", place.passes},
                             {"batches", place.batches},
                             {"batches_per_pass", size ? State(*size) : State()},
                             {"finished", place.finished},
                             {"base_seed", static_cast<int64_t>(place.base_seed)},
                             {"sampler", place.order}});
  if (place.lanes.empty()) return state;
  State::List lanes;
  for (const auto& lane : place.lanes) {
    lanes.push_back(
        State::dict({{"batches", lane.batches}, {"ended", lane.ended}, {"stream", lane.state}}));
  }
  state["workers"] = std::move(lanes);
  state["next_worker"] = place.cursor;
  return state;
}

std::shared_ptr<LoadPlace> to_place(const State& state) {
  auto place = std::make_shared<LoadPlace>();
  place->epoch = state.at("epoch").as_int();
  place->passes = state.at("passes").as_int();
  place->batches = state.at("batches").as_int();
  place->finished = state.at("finished").as_bool();
  place->base_seed = static_cast<uint64_t>(state.at("base_seed").as_int());
  place->order = state.at("sampler");
  place->restored = true;
  if (!state.contains("workers")) return place;
  for (const State& lane : state.at("workers").as_list()) {
    place->lanes.push_back(
        {lane.at("stream"), lane.at("batches").as_int(), lane.at("ended").as_bool()});
  }
  place->cursor = state.at("next_worker").as_int();
  return place;
}

}  // namespace

DataLoaderOptions& DataLoaderOptions::sampler(std::shared_ptr<Sampler> sampler) {
  sampler_ = std::move(sampler);
  return *this;
}

DataLoaderOptions& DataLoaderOptions::batch_sampler(
    std::shared_ptr<BatchSamplerBase> batch_sampler) {
  batch_sampler_ = std::move(batch_sampler);
  return *this;
}

DataLoaderOptions& DataLoaderOptions::collate_fn(CollateFunction collate_fn) {
  collate_fn_ = std::move(collate_fn);
  return *this;
}

DataLoaderOptions& DataLoaderOptions::worker_init_fn(std::function<void(int64_t)> worker_init_fn) {
  worker_init_fn_ = std::move(worker_init_fn);
  return *this;
}

// ---- What a pass loads --------------------------------------------------------------------------

// The user's sampler, or what `shuffle` says. Ranks that share one random order without padding
// need it to be the same on all of them.
std::shared_ptr<Sampler> DataLoader::Impl::make_order() const {
  const int64_t samples = plan.dataset->size();
  if (sequential) return std::make_shared<SequentialSampler>(samples);
  if (options.sampler() != nullptr) return options.sampler();
  if (!options.shuffle()) return std::make_shared<SequentialSampler>(samples);
  const auto seed = share && predict ? shared_seed(options) : seed_of(options);
  return std::make_shared<RandomSampler>(samples, seed);
}

// This rank's part of an order. Source: Lightning 2.6, `_get_distributed_sampler`.
std::shared_ptr<Sampler> DataLoader::Impl::make_share(const std::shared_ptr<Sampler>& order) const {
  DistributedSamplerOptions shared;
  shared.num_replicas = share->num_replicas;
  shared.rank = share->rank;
  shared.shuffle = share_shuffles && !sequential && !predict;
  shared.seed = shared_seed(options);
  const bool plain = dynamic_cast<RandomSampler*>(order.get()) != nullptr ||
                     dynamic_cast<SequentialSampler*>(order.get()) != nullptr;
  if (plain && !predict) {
    return std::make_shared<DistributedSampler>(plan.dataset->size(), shared);
  }
  return std::make_shared<DistributedSamplerWrapper>(order, shared, /*repeat=*/!predict);
}

std::shared_ptr<BatchSamplerBase> DataLoader::Impl::make_batches() const {
  auto batches = options.batch_sampler();
  if (batches == nullptr) {
    auto order = make_order();
    if (share) order = make_share(order);
    return std::make_shared<BatchSampler>(order, options.batch_size().value_or(1),
                                          options.drop_last() && !predict);
  }
  if (predict) {
    if (auto complete = batches->keep_last()) batches = std::move(complete);
  }
  if (!sequential && !share) return batches;
  auto order = batches->sampler();
  if (sequential || order == nullptr) {
    order = std::make_shared<SequentialSampler>(plan.dataset->size());
  }
  if (auto replaced = batches->with_sampler(share ? make_share(order) : order)) return replaced;
  if (sequential) batches = std::make_shared<RepeatedBatchSampler>(batches);
  if (share) {
    batches = std::make_shared<DistributedBatchSampler>(batches, *share, /*repeat=*/!predict);
  }
  return batches;
}

std::optional<int64_t> DataLoader::Impl::size() const {
  if (plan.batch_sampler != nullptr) return plan.batch_sampler->size();
  const auto samples = plan.stream->size();
  if (!samples || !plan.batch_size) return samples;
  return (*samples + (plan.drop_last ? 0 : *plan.batch_size - 1)) / *plan.batch_size;
}

// As often as Python's loader draws: once for a pass, once in all for persistent workers. Ranks
// that were seeded alike augment differently.
uint64_t DataLoader::Impl::draw_base_seed() {
  const auto draw = [] {
    return static_cast<uint64_t>(at::empty({}, at::kLong).random_().item<int64_t>());
  };
  uint64_t seed = 0;
  if (options.seed()) {
    seed = mix_seed(*seed_of(options), static_cast<uint64_t>(epoch), static_cast<uint64_t>(passes));
  } else if (options.persistent_workers()) {
    if (!persistent_seed) persistent_seed = draw();
    seed = (*persistent_seed)++;
  } else {
    seed = draw();
  }
  const auto sampler = plan.batch_sampler != nullptr ? plan.batch_sampler->sampler() : nullptr;
  const auto rank = share ? share->rank : rank_of(sampler);
  return rank ? mix_seed(seed, static_cast<uint64_t>(*rank)) : seed;
}

// A pass that still lives keeps the persistent workers to itself; one beside it gets its own.
std::shared_ptr<LoadWorkers> DataLoader::Impl::workers() {
  if (plan.num_workers == 0) return nullptr;
  if (!options.persistent_workers() || persistent.use_count() > 1) {
    return std::make_shared<LoadWorkers>(plan);
  }
  if (persistent == nullptr) persistent = std::make_shared<LoadWorkers>(plan);
  return persistent;
}

// ---- The loader ---------------------------------------------------------------------------------

DataLoader::DataLoader(std::shared_ptr<Dataset> dataset, DataLoaderOptions options)
    : impl_(std::make_shared<Impl>()) {
  if (dataset == nullptr) refuse("no data set.");
  check(options, /*is_stream=*/false);
  impl_->plan = make_plan(options);
  impl_->plan.dataset = std::move(dataset);
  impl_->options = std::move(options);
  impl_->plan.batch_sampler = impl_->make_batches();
}

DataLoader::DataLoader(std::shared_ptr<StreamDataset> dataset, DataLoaderOptions options)
    : impl_(std::make_shared<Impl>()) {
  if (dataset == nullptr) refuse("no data set.");
  check(options, /*is_stream=*/true);
  impl_->plan = make_plan(options);
  impl_->plan.stream = std::move(dataset);
  impl_->options = std::move(options);
}

std::unique_ptr<LoaderIterator> DataLoader::iterate() {
  auto place = std::exchange(impl_->restored, nullptr);
  if (place == nullptr) {
    place = std::make_shared<LoadPlace>();
    place->epoch = impl_->epoch;
    place->base_seed = impl_->draw_base_seed();
  }
  place->passes = ++impl_->passes;
  impl_->place = place;
  return begin_pass(impl_->plan, std::move(place), impl_->workers());
}

std::optional<int64_t> DataLoader::size() const { return impl_->size(); }

void DataLoader::set_epoch(int64_t epoch) {
  if (epoch != impl_->epoch) impl_->restored = nullptr;
  if (impl_->restored == nullptr) impl_->passes = 0;
  impl_->epoch = epoch;
  if (impl_->plan.batch_sampler != nullptr) impl_->plan.batch_sampler->set_epoch(epoch);
  if (impl_->plan.stream != nullptr) impl_->plan.stream->set_epoch(epoch);
}

template <class Change>
std::shared_ptr<Loader> DataLoader::changed(Change change) const {
  if (impl_->plan.dataset == nullptr) return nullptr;
  auto impl = std::make_shared<Impl>();
  impl->plan = impl_->plan;
  impl->options = impl_->options;
  impl->sequential = impl_->sequential;
  impl->predict = impl_->predict;
  impl->share = impl_->share;
  impl->share_shuffles = impl_->share_shuffles;
  change(*impl);
  impl->plan.batch_sampler = impl->make_batches();
  return std::shared_ptr<DataLoader>(new DataLoader(std::move(impl)));
}

std::shared_ptr<Loader> DataLoader::sequential() const {
  return changed([](Impl& impl) { impl.sequential = true; });
}

std::shared_ptr<Loader> DataLoader::for_predict() const {
  return changed([](Impl& impl) { impl.predict = true; });
}

std::shared_ptr<Loader> DataLoader::distributed(const SamplerArguments& share, bool shuffle) const {
  const auto& batches = impl_->options.batch_sampler();
  const auto order = batches != nullptr ? batches->sampler() : impl_->options.sampler();
  if (impl_->share || rank_of(order)) return nullptr;
  return changed([&](Impl& impl) {
    impl.share = share;
    impl.share_shuffles = shuffle;
  });
}

bool DataLoader::shuffles() const {
  return impl_->plan.batch_sampler != nullptr && impl_->plan.batch_sampler->shuffles();
}

int64_t DataLoader::num_workers() const { return impl_->plan.num_workers; }

bool DataLoader::is_stateful() const {
  return impl_->plan.dataset != nullptr || impl_->plan.stream->is_stateful();
}

State DataLoader::state_dict() const {
  if (!is_stateful()) return {};
  if (impl_->restored != nullptr) return to_state(*impl_->restored, size());
  if (impl_->place != nullptr) return to_state(*impl_->place, size());
  LoadPlace none;
  none.epoch = impl_->epoch;
  none.passes = impl_->passes;
  none.finished = true;  // nothing begun that could go on
  return to_state(none, size());
}

void DataLoader::load_state_dict(const State& state) {
  if (!is_stateful() || state.empty()) return;
  auto place = to_place(state);
  set_epoch(place->epoch);
  impl_->restored = nullptr;
  impl_->passes = place->passes;
  if (place->finished) {
    skip_pass(*place);
    impl_->place = std::move(place);
    return;
  }
  const State& saved = state.at("batches_per_pass");
  const auto now = size();
  if (!saved.is_none() && now && saved.as_int() != *now) {
    throw CheckpointError(
        str("Cannot resume after batch ", place->batches, " of ", saved.as_int(),
            ": this DataLoader has ", *now,
            " batches in a pass. Use the data set, batch_size and number of processes of the run "
            "that was saved, or resume from a checkpoint of an epoch's end."));
  }
  const auto lanes = static_cast<size_t>(std::max<int64_t>(num_workers(), 1));
  if (impl_->plan.stream != nullptr && place->lanes.size() != lanes) {
    throw CheckpointError(str("Cannot resume a stream in the middle: it was saved with ",
                              place->lanes.size(), " parts, and num_workers ", num_workers(),
                              " makes ", lanes, ". Use as many workers as before."));
  }
  --impl_->passes;  // the pass begins once more
  impl_->restored = std::move(place);
}

State DataLoader::one_batch_earlier(State state) const {
  const int64_t batches = state.at("batches").as_int();
  if (state.contains("workers") || batches == 0) return {};
  state["batches"] = batches - 1;
  state["finished"] = false;
  return state;
}

State DataLoader::after_pass(State state) const {
  state["finished"] = true;
  return state;
}

// A sampler that counts its passes has the finished one behind it.
void DataLoader::skip_pass(const LoadPlace& place) {
  if (impl_->plan.batch_sampler == nullptr || place.order.empty()) return;
  impl_->plan.batch_sampler->load_state_dict(place.order);
  impl_->plan.batch_sampler->iterate();
}

const DataLoaderOptions& DataLoader::options() const { return impl_->options; }
const std::shared_ptr<Dataset>& DataLoader::dataset() const { return impl_->plan.dataset; }
const std::shared_ptr<StreamDataset>& DataLoader::stream_dataset() const {
  return impl_->plan.stream;
}
const std::shared_ptr<BatchSamplerBase>& DataLoader::batch_sampler() const {
  return impl_->plan.batch_sampler;
}

}  // namespace lightning
