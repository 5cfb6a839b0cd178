// Batches of a data set, loaded ahead by worker threads.
//
//   DataLoader loader(FashionMNIST(), DataLoaderOptions().batch_size(64).shuffle(true)
//                                         .num_workers(2));
//   for (auto pass = loader.iterate(); auto batch = pass->next();) train(*batch);
//
// A DataLoader is a handle: copies share one data set, one place in it and, while they persist, the
// workers. It and its iterators belong to one thread, but for interrupt().
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "lightning/data/dataset.h"
#include "lightning/data/loader.h"
#include "lightning/data/sampler.h"
#include "lightning/options.h"

namespace lightning {

struct DataLoaderOptions : Options<DataLoaderOptions> {
  DataLoaderOptions() = default;
  DataLoaderOptions(int64_t batch_size) { batch_size_ = batch_size; }

  OPTION(std::optional<int64_t>, batch_size, 1,
         "Samples in a batch. null gives each sample as it is, without a batch dimension.");
  OPTION(bool, shuffle, false, "A new random order in each epoch.");
  OPTION(int64_t, num_workers, 0, "Threads that load ahead. 0 loads in the caller's thread.");
  OPTION(
      bool, pin_memory, false,
      "Batches in page-locked memory, from which copies to a GPU run beside computation. Without "
      "effect where there is no CUDA device.");
  OPTION(bool, drop_last, false, "Leave out the last batch of a pass when it is incomplete.");
  OPTION(std::optional<int64_t>, prefetch_factor, std::nullopt,
         "Batches in flight for each worker, from its start to its delivery. null: 2.");
  OPTION(bool, persistent_workers, false, "Keep the threads from one pass to the next.");
  OPTION(double, timeout_s, 0.0, "Seconds to wait for a batch before it is an error. 0: no limit.");
  OPTION(std::optional<int64_t>, seed, std::nullopt,
         "Seed of order and augmentation, to which the epoch is added. null draws one from the "
         "default generator for each pass.");

  // Parts that are objects, and so have no place in YAML.

  // The order of samples, instead of `shuffle`.
  DataLoaderOptions& sampler(std::shared_ptr<Sampler> sampler);
  const std::shared_ptr<Sampler>& sampler() const { return sampler_; }
  // The batches, instead of `batch_size`, `shuffle`, `drop_last` and `sampler`.
  DataLoaderOptions& batch_sampler(std::shared_ptr<BatchSamplerBase> batch_sampler);
  const std::shared_ptr<BatchSamplerBase>& batch_sampler() const { return batch_sampler_; }
  // What makes a batch of samples, instead of default_collate. Called from several threads at once.
  DataLoaderOptions& collate_fn(CollateFunction collate_fn);
  const CollateFunction& collate_fn() const { return collate_fn_; }
  // Called on each worker's thread when it starts, with the worker's id.
  DataLoaderOptions& worker_init_fn(std::function<void(int64_t)> worker_init_fn);
  const std::function<void(int64_t)>& worker_init_fn() const { return worker_init_fn_; }

 private:
  std::shared_ptr<Sampler> sampler_;
  std::shared_ptr<BatchSamplerBase> batch_sampler_;
  CollateFunction collate_fn_;
  std::function<void(int64_t)> worker_init_fn_;
};

// A batch could not be made. Thrown by next() in that batch's place, nested around the exception of
// the data set or the collate function (`std::rethrow_if_nested` gives it); the batches before it
// were delivered, and the pass may go on after it.
class DataLoaderError : public std::runtime_error {
 public:
  DataLoaderError(const std::string& what, int64_t worker_id, int64_t batch_idx)
      : std::runtime_error(what), worker_id_(worker_id), batch_idx_(batch_idx) {}
  int64_t worker_id() const { return worker_id_; }  // -1: the caller's thread
  int64_t batch_idx() const { return batch_idx_; }  // in the pass, from 0

 private:
  int64_t worker_id_;
  int64_t batch_idx_;
};

struct LoadPlace;

class DataLoader : public Loader {
 public:
  // From a Dataset, a StreamDataset, a shared_ptr to either or, with "lightning/data/
  // torch_dataset.h", any torch::data data set.
  // Errors: MisconfigurationError for options that make no sense or exclude one another.
  DataLoader(std::shared_ptr<Dataset> dataset, DataLoaderOptions options = {});
  DataLoader(std::shared_ptr<StreamDataset> dataset, DataLoaderOptions options = {});
  template <class D, std::enable_if_t<!std::is_base_of<Loader, std::decay_t<D>>::value, int> = 0>
  DataLoader(D&& dataset, DataLoaderOptions options = {})
      : DataLoader(as_dataset(std::forward<D>(dataset)), std::move(options)) {}

  // Workers start here and end with the iterator, or with the last copy of the loader where they
  // persist. Draws from LibTorch's default generator what Python's loader draws, in that order.
  std::unique_ptr<LoaderIterator> iterate() override;

  // For a stream whose size is known: ceil(size / batch_size), or floor with drop_last.
  std::optional<int64_t> size() const override;
  void set_epoch(int64_t epoch) override;

  std::shared_ptr<Loader> sequential() const override;
  std::shared_ptr<Loader> for_predict() const override;
  // Null for streams, which share themselves out, and where a DistributedSampler is in place.
  // Its seed is that of the options, else PL_GLOBAL_SEED, else 0.
  std::shared_ptr<Loader> distributed(const SamplerArguments& share, bool shuffle) const override;
  bool shuffles() const override;
  int64_t num_workers() const override;

  // The place is that of the last batch that next() gave; batches loaded ahead do not count. Once
  // loaded it holds for the next iterate(), which then gives the batches that were still to come,
  // in their order and with their random numbers. It is forgotten when set_epoch() names another
  // epoch or when the pass was complete.
  // Errors: CheckpointError where a pass has another number of batches than the one saved.
  bool is_stateful() const override;
  State state_dict() const override;
  void load_state_dict(const State& state) override;
  State one_batch_earlier(State state) const override;  // None for a stream
  State after_pass(State state) const override;

  const DataLoaderOptions& options() const;
  const std::shared_ptr<Dataset>& dataset() const;               // null for a stream
  const std::shared_ptr<StreamDataset>& stream_dataset() const;  // null for a map-style one
  const std::shared_ptr<BatchSamplerBase>& batch_sampler() const;

  struct Impl;

 private:
  explicit DataLoader(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
  void skip_pass(const LoadPlace& place);
  template <class Change>
  std::shared_ptr<Loader> changed(Change change) const;

  std::shared_ptr<Impl> impl_;
};

}  // namespace lightning
