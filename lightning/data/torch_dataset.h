// Any `torch::data` data set as one of ours: with this header included, a DataLoader takes it as it
// is.
//
//   DataLoader loader(torch::data::datasets::MNIST(root).map(torch::data::transforms::Stack<>()),
//                     DataLoaderOptions().batch_size(64));
//
// An `Example` becomes a list of data and target, a `TensorExample` its tensor. Each worker has a
// copy of the data set, as torch's own loader makes one; a `SharedBatchDataset` or a shared_ptr is
// shared.
#pragma once

#include <torch/data/datasets/base.h>
#include <torch/data/datasets/shared.h>
#include <torch/data/datasets/stateful.h>
#include <torch/data/example.h>

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "lightning/data/dataset.h"
#include "lightning/errors.h"

namespace lightning {

// How a value of a sample becomes a node of a batch. Specialise it for types of your own.
template <class T, class = void>
struct ToBatch {
  static Batch from(T value) { return Batch(std::move(value)); }  // tensors, strings, Batch itself
};
template <class T>
struct ToBatch<T, std::enable_if_t<std::is_integral<T>::value && !std::is_same<T, bool>::value>> {
  static Batch from(T value) { return Batch(static_cast<int64_t>(value)); }
};
template <class T>
struct ToBatch<T, std::enable_if_t<std::is_floating_point<T>::value>> {
  static Batch from(T value) { return Batch(static_cast<double>(value)); }
};
template <class T>
struct ToBatch<std::vector<T>> {
  static Batch from(std::vector<T> values) {
    Batch::List items;
    for (auto& value : values) items.push_back(ToBatch<T>::from(std::move(value)));
    return Batch::list(std::move(items));
  }
};
template <class T, size_t N>
struct ToBatch<std::array<T, N>> {
  static Batch from(std::array<T, N> values) {
    return ToBatch<std::vector<T>>::from({values.begin(), values.end()});
  }
};
template <class... T>
struct ToBatch<std::tuple<T...>> {
  static Batch from(std::tuple<T...> values) {
    return std::apply(
        [](auto&&... value) {
          return Batch::list({ToBatch<std::decay_t<decltype(value)>>::from(std::move(value))...});
        },
        std::move(values));
  }
};
template <class A, class B>
struct ToBatch<std::pair<A, B>> {
  static Batch from(std::pair<A, B> values) {
    return ToBatch<std::tuple<A, B>>::from(std::move(values));
  }
};
template <class T>
struct ToBatch<std::map<std::string, T>> {
  static Batch from(std::map<std::string, T> values) {
    Batch::Map items;
    for (auto& [key, value] : values) items.emplace_back(key, ToBatch<T>::from(std::move(value)));
    return Batch::map(std::move(items));
  }
};
template <class T>
struct ToBatch<std::unordered_map<std::string, T>> {
  static Batch from(std::unordered_map<std::string, T> values) {
    return ToBatch<std::map<std::string, T>>::from({values.begin(), values.end()});
  }
};
template <class Data, class Target>
struct ToBatch<torch::data::Example<Data, Target>> {
  static Batch from(torch::data::Example<Data, Target> example) {
    return Batch::list({ToBatch<Data>::from(std::move(example.data)),
                        ToBatch<Target>::from(std::move(example.target))});
  }
};
template <class Data>
struct ToBatch<torch::data::Example<Data, torch::data::example::NoTarget>> {
  static Batch from(torch::data::Example<Data, torch::data::example::NoTarget> example) {
    return ToBatch<Data>::from(std::move(example.data));
  }
};

namespace torch_dataset {

template <class T>
struct is_vector : std::false_type {};
template <class T>
struct is_vector<std::vector<T>> : std::true_type {};

template <class T>
struct unwrap_optional {
  using type = T;
};
template <class T>
struct unwrap_optional<std::optional<T>> {
  using type = T;
};

// What get_batch gives: a vector of examples, which is collated, or what a `Stack` has made of it.
template <class Given>
std::vector<Batch> samples(Given given) {
  return ToBatch<Given>::from(std::move(given)).as_list();
}
template <class Given>
Batch collated(Given given) {
  if constexpr (is_vector<Given>::value) {
    return default_collate(samples(std::move(given)));
  } else {
    return ToBatch<Given>::from(std::move(given));
  }
}
// The only sample of a batch of one.
template <class Given>
Batch single(Given given) {
  if constexpr (is_vector<Given>::value) {
    return samples(std::move(given)).at(0);
  } else {
    return collated(std::move(given)).apply([](const at::Tensor& tensor) {
      return tensor.dim() == 0 ? tensor : tensor.select(0, 0);
    });
  }
}

// Asked for a list of indices.
template <class D>
class MapStyle : public Dataset {
 public:
  explicit MapStyle(D dataset) : dataset_(std::move(dataset)) {
    const auto size = dataset_.size();
    if (!size) {
      throw MisconfigurationError(
          "A torch::data data set that is read by index has no size(). Give it one, or derive it "
          "from torch::data::datasets::StreamDataset.");
    }
    size_ = static_cast<int64_t>(*size);
  }

  int64_t size() const override { return size_; }
  Batch get(int64_t index) override {
    const auto place = static_cast<size_t>(index);
    return single(dataset_.get_batch(place));
  }
  std::optional<Batch> get_batch(const std::vector<int64_t>& indices) override {
    return collated(dataset_.get_batch(std::vector<size_t>(indices.begin(), indices.end())));
  }
  std::shared_ptr<Dataset> for_worker() const override { return std::make_shared<MapStyle>(*this); }

 private:
  D dataset_;
  int64_t size_;
};

// Asked for a number of samples. Stateful data sets say when they end; others end after size()
// samples, of which the workers take batches in turn, or with an empty batch, or never.
template <class D>
class StreamStyle : public StreamDataset {
 public:
  explicit StreamStyle(D dataset) : dataset_(std::move(dataset)) {}

  void reset() override {
    if constexpr (D::is_stateful) dataset_.reset();
  }
  std::unique_ptr<Stream> open(const WorkerInfo& worker) override {
    return std::make_unique<Part>(dataset_, worker);
  }
  std::optional<int64_t> size() const override {
    const auto size = dataset_.size();
    return size ? std::optional<int64_t>(static_cast<int64_t>(*size)) : std::nullopt;
  }

 private:
  class Part : public Stream {
   public:
    Part(D dataset, const WorkerInfo& worker)
        : dataset_(std::move(dataset)), turn_(worker.id), turns_(worker.num_workers) {}

    std::optional<Batch> next() override {
      auto given = read(1);
      return given ? std::optional<Batch>(single(std::move(*given))) : std::nullopt;
    }
    std::optional<Batch> next_batch(int64_t batch_size) override {
      auto given = read(batch_size);
      return given ? std::optional<Batch>(collated(std::move(*given))) : std::nullopt;
    }

   private:
    using Given = typename unwrap_optional<typename D::BatchType>::type;

    std::optional<Given> read(int64_t count) {
      if constexpr (!D::is_stateful) {
        const auto size = dataset_.size();
        if (size) count = std::min(count, static_cast<int64_t>(*size) - turn_ * count);
        turn_ += turns_;
      }
      if (count <= 0) return std::nullopt;
      std::optional<Given> given = dataset_.get_batch(static_cast<size_t>(count));
      if constexpr (is_vector<Given>::value) {
        if (given && given->empty()) return std::nullopt;
      }
      return given;
    }

    D dataset_;
    int64_t turn_;   // which batch of the pass is next
    int64_t turns_;  // by how many each part moves on
  };

  D dataset_;
};

}  // namespace torch_dataset

// Torch's own bases all have these three names.
template <class D>
struct DatasetAdapter<
    D, std::void_t<typename D::BatchType, typename D::BatchRequestType, decltype(D::is_stateful)>> {
  static constexpr bool kIsStream = std::is_same<typename D::BatchRequestType, size_t>::value;
  using Adapted =
      std::conditional_t<kIsStream, torch_dataset::StreamStyle<D>, torch_dataset::MapStyle<D>>;
  using Kind = std::conditional_t<kIsStream, StreamDataset, Dataset>;

  static std::shared_ptr<Kind> make(D dataset) {
    return std::make_shared<Adapted>(std::move(dataset));
  }
};

// One data set for all workers, which must be safe for them.
template <class D>
struct DatasetAdapter<std::shared_ptr<D>> {
  static auto make(std::shared_ptr<D> dataset) {
    using Shared = torch::data::datasets::SharedBatchDataset<D>;
    return DatasetAdapter<Shared>::make(Shared(std::move(dataset)));
  }
};

}  // namespace lightning
