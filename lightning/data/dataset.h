// Where samples come from: `Dataset` finds a sample by its index, `StreamDataset` gives one after
// another. `torch_dataset.h` makes either of any `torch::data` data set.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "lightning/batch.h"
#include "lightning/checkpoint/state.h"
#include "lightning/data/worker.h"

namespace lightning {

// Makes a batch of samples.
using CollateFunction = std::function<Batch(std::vector<Batch> samples)>;

// Tensors of one shape and dtype are stacked; bool, int and double become tensors of bool, int64
// and float64; strings become a list; lists and maps are collated item by item. Errors:
// MisconfigurationError where samples differ in kind, shape, dtype or keys, with the place. Source:
// torch 2.11, `default_collate`.
Batch default_collate(const std::vector<Batch>& samples);

// Samples by index. Loaders call get() and get_batch() from several threads at once, unless
// for_worker() gives each worker an object of its own.
class Dataset {
 public:
  virtual ~Dataset() = default;

  virtual int64_t size() const = 0;

  // The sample at 0 <= index < size().
  virtual Batch get(int64_t index) = 0;

  // The samples at these indices as one batch, collated as default_collate would. For data sets
  // that are faster so; nullopt (always, or never) lets the loader collate samples of get(). Not
  // asked where the loader has a collate function of the user's.
  virtual std::optional<Batch> get_batch(const std::vector<int64_t>& /*indices*/) {
    return std::nullopt;
  }

  // An object for the use of one worker; null when this one may be shared by all.
  virtual std::shared_ptr<Dataset> for_worker() const { return nullptr; }
};

// One pass over a stream, or a worker's part of it. Used by one thread.
class Stream {
 public:
  virtual ~Stream() = default;

  // The next sample; nullopt at the end.
  virtual std::optional<Batch> next() = 0;

  // The next samples as one batch: `batch_size` of them, fewer at the end, nullopt when there is
  // none. Collates samples of next(), which a stream of whole batches replaces.
  virtual std::optional<Batch> next_batch(int64_t batch_size);

  // The place in the stream, where the data set says is_stateful().
  virtual State state_dict() const { return {}; }
  virtual void load_state_dict(const State&) {}
};

// Samples one after another, maybe without end.
class StreamDataset {
 public:
  virtual ~StreamDataset() = default;

  // Called on the caller's thread when a pass begins, before its streams are opened.
  virtual void reset() {}
  // The epoch of the passes that follow, for a stream whose order depends on it.
  virtual void set_epoch(int64_t /*epoch*/) {}

  // The part of worker `worker.id` of `worker.num_workers`: each sample belongs in one of the
  // parts. Called on the caller's thread, once for each worker; the parts are then used side by
  // side.
  virtual std::unique_ptr<Stream> open(const WorkerInfo& worker) = 0;

  // Samples in one pass over all parts, where that is known.
  virtual std::optional<int64_t> size() const { return std::nullopt; }

  // True where streams save and restore their place.
  virtual bool is_stateful() const { return false; }
};

// The rows of tensors: a tree in which every tensor has the same first dim. A sample is the tree of
// one row each.
//
//   TensorDataset(Batch::map({{"image", images}, {"label", labels}}))
//   TensorDataset({images, labels})   a list of two
class TensorDataset : public Dataset {
 public:
  // Errors: MisconfigurationError where first dims differ or there is no tensor.
  explicit TensorDataset(Batch tensors);
  TensorDataset(std::initializer_list<at::Tensor> tensors);

  int64_t size() const override { return size_; }
  Batch get(int64_t index) override;
  std::optional<Batch> get_batch(const std::vector<int64_t>& indices) override;

 private:
  Batch tensors_;
  int64_t size_ = 0;
};

// `size` samples made by a function of the index, which several threads call at once.
class FunctionDataset : public Dataset {
 public:
  FunctionDataset(int64_t size, std::function<Batch(int64_t)> sample)
      : size_(size), sample_(std::move(sample)) {}

  int64_t size() const override { return size_; }
  Batch get(int64_t index) override { return sample_(index); }

 private:
  int64_t size_;
  std::function<Batch(int64_t)> sample_;
};

// Some samples of a data set, in the order of `indices`.
// Errors: MisconfigurationError for an index outside the data set.
class Subset : public Dataset {
 public:
  Subset(std::shared_ptr<Dataset> dataset, std::vector<int64_t> indices);

  int64_t size() const override { return static_cast<int64_t>(indices_->size()); }
  Batch get(int64_t index) override { return dataset_->get(indices_->at(index)); }
  std::optional<Batch> get_batch(const std::vector<int64_t>& indices) override;
  std::shared_ptr<Dataset> for_worker() const override;
  const std::vector<int64_t>& indices() const { return *indices_; }

 private:
  std::shared_ptr<Dataset> dataset_;
  std::shared_ptr<const std::vector<int64_t>> indices_;
};

// Parts without overlap, drawn at random. Lengths are counts that add up to the data set's size, or
// fractions that add up to 1 (what rounding leaves goes to the first parts, one each).
//   seed   nullopt draws from LibTorch's default generator
// Errors: MisconfigurationError with the sum that was given.
// Source: torch 2.11, `random_split`; the same parts for the same seed.
std::vector<std::shared_ptr<Subset>> random_split(const std::shared_ptr<Dataset>& dataset,
                                                  const std::vector<int64_t>& lengths,
                                                  std::optional<uint64_t> seed = std::nullopt);
std::vector<std::shared_ptr<Subset>> random_split(const std::shared_ptr<Dataset>& dataset,
                                                  const std::vector<double>& fractions,
                                                  std::optional<uint64_t> seed = std::nullopt);

// Makes a data set of a value of another library; `torch_dataset.h` does for `torch::data`.
// A specialisation has `static std::shared_ptr<Dataset or StreamDataset> make(D dataset)`.
template <class D, class = void>
struct DatasetAdapter {
  template <class T>
  struct Never : std::false_type {};
  static_assert(
      Never<D>::value,
      "A DataLoader takes a lightning::Dataset, a lightning::StreamDataset, a shared_ptr to "
      "one, or a torch::data data set (include \"lightning/data/torch_dataset.h\").");
};

// A shared pointer to what was given, as `Dataset` or `StreamDataset`.
template <class T>
auto as_dataset(std::shared_ptr<T> dataset) {
  if constexpr (std::is_base_of<Dataset, T>::value) {
    return std::shared_ptr<Dataset>(std::move(dataset));
  } else if constexpr (std::is_base_of<StreamDataset, T>::value) {
    return std::shared_ptr<StreamDataset>(std::move(dataset));
  } else {
    return DatasetAdapter<std::shared_ptr<T>>::make(std::move(dataset));
  }
}
template <class D>
auto as_dataset(D dataset) {
  if constexpr (std::is_base_of<Dataset, D>::value) {
    return std::shared_ptr<Dataset>(std::make_shared<D>(std::move(dataset)));
  } else if constexpr (std::is_base_of<StreamDataset, D>::value) {
    return std::shared_ptr<StreamDataset>(std::make_shared<D>(std::move(dataset)));
  } else {
    return DatasetAdapter<D>::make(std::move(dataset));
  }
}

}  // namespace lightning
