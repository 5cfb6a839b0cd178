#include "lightning/data/dataset.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Functions.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>

#include "lightning/errors.h"

namespace lightning {
namespace {

using Samples = std::vector<const Batch*>;

[[noreturn]] void refuse(const Samples& samples, size_t odd, const std::string& where) {
  throw MisconfigurationError(str(
      "Cannot collate samples", where.empty() ? "" : " at ", where, ": the first of the batch is ",
      samples[0]->describe(), ", number ", odd, " is ", samples[odd]->describe(),
      ". Make the data set return samples of one kind and shape, or give the loader a "
      "collate_fn."));
}

template <class Same>
void require(const Samples& samples, const std::string& where, Same same) {
  for (size_t i = 1; i < samples.size(); ++i) {
    if (!same(*samples[i])) refuse(samples, i, where);
  }
}

// Rows are copied straight into the batch where the memory is plain; autograd, devices and the rest
// are left to at::stack.
Batch stack_tensors(const Samples& samples, const std::string& where) {
  const at::Tensor& first = samples[0]->tensor();
  bool plain = true;
  require(samples, where, [&](const Batch& sample) {
    return sample.is_tensor() && sample.tensor().sizes() == first.sizes() &&
           sample.tensor().scalar_type() == first.scalar_type();
  });
  for (const Batch* sample : samples) {
    const at::Tensor& tensor = sample->tensor();
    plain = plain && tensor.layout() == at::kStrided && tensor.is_cpu() && tensor.is_contiguous() &&
            !tensor.requires_grad() && !tensor.is_neg() && !tensor.is_conj();
  }
  if (!plain) {
    std::vector<at::Tensor> tensors;
    for (const Batch* sample : samples) tensors.push_back(sample->tensor());
    return at::stack(tensors);
  }
  std::vector<int64_t> sizes{static_cast<int64_t>(samples.size())};
  sizes.insert(sizes.end(), first.sizes().begin(), first.sizes().end());
  at::Tensor batch = at::empty(sizes, first.options());
  const size_t row_bytes = first.nbytes();
  if (row_bytes == 0) return batch;
  auto* out = static_cast<char*>(batch.mutable_data_ptr());
  for (const Batch* sample : samples) {
    std::memcpy(out, sample->tensor().const_data_ptr(), row_bytes);
    out += row_bytes;
  }
  return batch;
}

template <class T, class Read>
Batch stack_values(const Samples& samples, at::ScalarType dtype, Read read) {
  at::Tensor batch = at::empty({static_cast<int64_t>(samples.size())}, dtype);
  T* out = batch.data_ptr<T>();
  for (const Batch* sample : samples) *out++ = read(*sample);
  return batch;
}

Batch collate(const Samples& samples, const std::string& where);

Batch collate_list(const Samples& samples, const std::string& where) {
  const size_t length = samples[0]->size();
  require(samples, where,
          [&](const Batch& sample) { return sample.is_list() && sample.size() == length; });
  Batch::List items;
  Samples column(samples.size());
  for (size_t item = 0; item < length; ++item) {
    for (size_t i = 0; i < samples.size(); ++i) column[i] = &samples[i]->as_list()[item];
    items.push_back(collate(column, where + str("[", item, "]")));
  }
  return Batch::list(std::move(items));
}

Batch collate_map(const Samples& samples, const std::string& where) {
  const Batch::Map& first = samples[0]->as_map();
  require(samples, where,
          [&](const Batch& sample) { return sample.is_map() && sample.size() == first.size(); });
  Batch::Map items;
  Samples column(samples.size());
  for (size_t item = 0; item < first.size(); ++item) {
    const std::string& key = first[item].first;
    for (size_t i = 0; i < samples.size(); ++i) {
      const auto& entry = samples[i]->as_map()[item];  // as a rule in the same place
      if (entry.first != key && !samples[i]->contains(key)) refuse(samples, i, where);
      column[i] = entry.first == key ? &entry.second : &samples[i]->at(key);
    }
    items.emplace_back(key, collate(column, where + "[\"" + key + "\"]"));
  }
  return Batch::map(std::move(items));
}

Batch collate(const Samples& samples, const std::string& where) {
  const Batch& first = *samples[0];
  if (first.is_tensor()) return stack_tensors(samples, where);
  if (first.is_list()) return collate_list(samples, where);
  if (first.is_map()) return collate_map(samples, where);
  if (first.is_bool()) {
    require(samples, where, [](const Batch& b) { return b.is_bool(); });
    return stack_values<bool>(samples, at::kBool, [](const Batch& b) { return b.as_bool(); });
  }
  if (first.is_int()) {
    require(samples, where, [](const Batch& b) { return b.is_int(); });
    return stack_values<int64_t>(samples, at::kLong, [](const Batch& b) { return b.as_int(); });
  }
  if (first.is_double()) {
    require(samples, where, [](const Batch& b) { return b.is_double() || b.is_int(); });
    return stack_values<double>(samples, at::kDouble, [](const Batch& b) { return b.as_double(); });
  }
  if (first.is_string()) {
    require(samples, where, [](const Batch& b) { return b.is_string(); });
    Batch::List items;
    for (const Batch* sample : samples) items.push_back(*sample);
    return Batch::list(std::move(items));
  }
  throw MisconfigurationError(
      str("Cannot collate samples", where.empty() ? "" : " at ", where,
          ": the data set returned none. Return a tensor, a number, a string, or a list or map of "
          "them, or give the loader a collate_fn."));
}

// The rows of every tensor of the tree.
Batch rows(const Batch& tensors, const std::vector<int64_t>& indices) {
  const at::Tensor index = at::from_blob(const_cast<int64_t*>(indices.data()),
                                         {static_cast<int64_t>(indices.size())}, at::kLong);
  return tensors.apply([&](const at::Tensor& tensor) {
    return at::index_select(tensor, 0, index.to(tensor.device()));
  });
}

}  // namespace

Batch default_collate(const std::vector<Batch>& samples) {
  if (samples.empty()) throw MisconfigurationError("Cannot make a batch of no samples.");
  Samples pointers;
  pointers.reserve(samples.size());
  for (const Batch& sample : samples) pointers.push_back(&sample);
  return collate(pointers, "");
}

std::optional<Batch> Stream::next_batch(int64_t batch_size) {
  std::vector<Batch> samples;
  while (static_cast<int64_t>(samples.size()) < batch_size) {
    auto sample = next();
    if (!sample) break;
    samples.push_back(std::move(*sample));
  }
  if (samples.empty()) return std::nullopt;
  return default_collate(samples);
}

TensorDataset::TensorDataset(Batch tensors) : tensors_(std::move(tensors)) {
  size_ = -1;
  tensors_.for_each_tensor([&](const at::Tensor& tensor) {
    if (tensor.dim() == 0 || (size_ >= 0 && tensor.size(0) != size_)) {
      throw MisconfigurationError(
          str("TensorDataset got ", tensors_.describe(),
              ", expected tensors with the same first dim, which counts the samples."));
    }
    size_ = tensor.size(0);
  });
  if (size_ < 0) {
    throw MisconfigurationError(
        str("TensorDataset got ", tensors_.describe(), ", expected at least one tensor."));
  }
}

TensorDataset::TensorDataset(std::initializer_list<at::Tensor> tensors)
    : TensorDataset(Batch::list(Batch::List(tensors.begin(), tensors.end()))) {}

Batch TensorDataset::get(int64_t index) {
  return tensors_.apply([&](const at::Tensor& tensor) { return tensor.select(0, index); });
}

std::optional<Batch> TensorDataset::get_batch(const std::vector<int64_t>& indices) {
  return rows(tensors_, indices);
}

Subset::Subset(std::shared_ptr<Dataset> dataset, std::vector<int64_t> indices)
    : dataset_(std::move(dataset)) {
  for (int64_t index : indices) {
    if (index < 0 || index >= dataset_->size()) {
      throw MisconfigurationError(str("Subset got index ", index, " of a data set of ",
                                      dataset_->size(), " samples, expected 0 to ",
                                      dataset_->size() - 1, "."));
    }
  }
  indices_ = std::make_shared<const std::vector<int64_t>>(std::move(indices));
}

std::optional<Batch> Subset::get_batch(const std::vector<int64_t>& indices) {
  std::vector<int64_t> of_dataset;
  of_dataset.reserve(indices.size());
  for (int64_t index : indices) of_dataset.push_back(indices_->at(index));
  return dataset_->get_batch(of_dataset);
}

std::shared_ptr<Dataset> Subset::for_worker() const {
  auto dataset = dataset_->for_worker();
  if (dataset == nullptr) return nullptr;
  auto subset = std::make_shared<Subset>(*this);
  subset->dataset_ = std::move(dataset);
  return subset;
}

std::vector<std::shared_ptr<Subset>> random_split(const std::shared_ptr<Dataset>& dataset,
                                                  const std::vector<int64_t>& lengths,
                                                  std::optional<uint64_t> seed) {
  const int64_t sum = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
  if (sum != dataset->size() ||
      std::any_of(lengths.begin(), lengths.end(), [](int64_t length) { return length < 0; })) {
    throw MisconfigurationError(str("random_split got lengths that add up to ", sum,
                                    ", expected counts that add up to the data set's ",
                                    dataset->size(), " samples."));
  }
  std::optional<at::Generator> generator;
  if (seed) {
    generator = at::detail::createCPUGenerator();
    generator->set_current_seed(*seed);
  }
  const at::Tensor order = at::randperm(sum, generator, at::TensorOptions(at::kLong));
  const int64_t* next = order.const_data_ptr<int64_t>();
  std::vector<std::shared_ptr<Subset>> parts;
  for (int64_t length : lengths) {
    parts.push_back(std::make_shared<Subset>(dataset, std::vector<int64_t>(next, next + length)));
    next += length;
  }
  return parts;
}

std::vector<std::shared_ptr<Subset>> random_split(const std::shared_ptr<Dataset>& dataset,
                                                  const std::vector<double>& fractions,
                                                  std::optional<uint64_t> seed) {
  const double sum = std::accumulate(fractions.begin(), fractions.end(), 0.0);
  if (std::abs(sum - 1.0) > 1e-6) {
    throw MisconfigurationError(
        str("random_split got fractions that add up to ", sum, ", expected 1."));
  }
  std::vector<int64_t> lengths;
  for (double fraction : fractions) {
    lengths.push_back(static_cast<int64_t>(std::floor(dataset->size() * fraction)));
  }
  const int64_t left =
      dataset->size() - std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
  for (int64_t i = 0; i < left; ++i) ++lengths[i % lengths.size()];
  return random_split(dataset, lengths, seed);
}

}  // namespace lightning
