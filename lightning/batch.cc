#include "lightning/batch.h"

#include <ATen/Functions.h>

#include <algorithm>

#include "lightning/device_transfer.h"
#include "lightning/errors.h"

namespace lightning {
namespace {

template <class List, class Key>
auto find_key(List& items, const Key& key) {
  return std::find_if(items.begin(), items.end(),
                      [&](const auto& item) { return item.first == key; });
}

// As Python names it: "float32".
std::string dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return "float32";
    case at::kDouble:
      return "float64";
    case at::kHalf:
      return "float16";
    case at::kBFloat16:
      return "bfloat16";
    case at::kLong:
      return "int64";
    case at::kInt:
      return "int32";
    case at::kShort:
      return "int16";
    case at::kChar:
      return "int8";
    case at::kByte:
      return "uint8";
    case at::kBool:
      return "bool";
    default:
      return c10::toString(dtype);
  }
}

[[noreturn]] void refuse(const Batch& batch, const std::string& wanted) {
  throw MisconfigurationError(
      str("The batch was asked for ", wanted, ", but it is ", batch.describe(), "."));
}

}  // namespace

Batch Batch::list(List items) {
  Batch batch;
  batch.value_ = std::move(items);
  return batch;
}

Batch Batch::map(Map items) {
  Batch batch;
  batch.value_ = std::move(items);
  return batch;
}

const at::Tensor& Batch::tensor() const {
  if (!is_tensor()) refuse(*this, "its tensor");
  return std::get<at::Tensor>(value_);
}

const Batch& Batch::at(const std::string& key) const {
  if (is_map()) {
    const auto& items = std::get<Map>(value_);
    const auto item = find_key(items, key);
    if (item != items.end()) return item->second;
  }
  refuse(*this, "key \"" + key + '"');
}

Batch& Batch::at(const std::string& key) {
  return const_cast<Batch&>(static_cast<const Batch*>(this)->at(key));
}

const Batch& Batch::at(size_t index) const {
  if (is_list() && index < as_list().size()) return as_list()[index];
  refuse(*this, str("item ", index));
}

Batch& Batch::at(size_t index) {
  return const_cast<Batch&>(static_cast<const Batch*>(this)->at(index));
}

bool Batch::contains(const std::string& key) const {
  if (!is_map()) return false;
  const auto& items = std::get<Map>(value_);
  return find_key(items, key) != items.end();
}

void Batch::set(const std::string& key, Batch value) {
  if (is_none()) value_ = Map();
  if (!is_map()) refuse(*this, "key \"" + key + '"');
  auto& items = std::get<Map>(value_);
  const auto item = find_key(items, key);
  if (item != items.end()) {
    item->second = std::move(value);
  } else {
    items.emplace_back(key, std::move(value));
  }
}

size_t Batch::size() const { return is_list() ? as_list().size() : is_map() ? as_map().size() : 0; }

const Batch::List& Batch::as_list() const {
  if (!is_list()) refuse(*this, "its list");
  return std::get<List>(value_);
}

const Batch::Map& Batch::as_map() const {
  if (!is_map()) refuse(*this, "its map");
  return std::get<Map>(value_);
}

bool Batch::as_bool() const {
  if (const auto* value = std::get_if<bool>(&value_)) return *value;
  refuse(*this, "its bool");
}

int64_t Batch::as_int() const {
  if (const auto* value = std::get_if<int64_t>(&value_)) return *value;
  refuse(*this, "its int");
}

double Batch::as_double() const {
  if (const auto* value = std::get_if<double>(&value_)) return *value;
  if (const auto* value = std::get_if<int64_t>(&value_)) return static_cast<double>(*value);
  refuse(*this, "its number");
}

const std::string& Batch::as_string() const {
  if (const auto* value = std::get_if<std::string>(&value_)) return *value;
  refuse(*this, "its string");
}

Batch Batch::apply(const std::function<at::Tensor(const at::Tensor&)>& f) const {
  if (is_tensor()) return f(std::get<at::Tensor>(value_));
  if (is_list()) {
    List items;
    items.reserve(size());
    for (const auto& item : as_list()) items.push_back(item.apply(f));
    return list(std::move(items));
  }
  if (is_map()) {
    Map items;
    items.reserve(size());
    for (const auto& [key, item] : as_map()) items.emplace_back(key, item.apply(f));
    return map(std::move(items));
  }
  return *this;
}

void Batch::for_each_tensor(const std::function<void(const at::Tensor&)>& f) const {
  if (is_tensor()) {
    f(std::get<at::Tensor>(value_));
  } else if (is_list()) {
    for (const auto& item : as_list()) item.for_each_tensor(f);
  } else if (is_map()) {
    for (const auto& item : as_map()) item.second.for_each_tensor(f);
  }
}

Batch Batch::to(at::Device device) const {
  const auto move = [&](const at::Tensor& tensor) {
    return tensor.device() == device ? tensor
                                     : tensor.to(device, /*non_blocking=*/!device.is_cpu());
  };
  if (!device.is_cuda()) return apply(move);
  DeviceTransfer transfer(device);
  auto moved = apply([&](const at::Tensor& tensor) {
    return tensor.device().is_cpu() ? transfer.copy(tensor) : move(tensor);
  });
  transfer.join();
  return moved;
}

Batch Batch::to_floating(at::ScalarType dtype) const {
  return apply([&](const at::Tensor& tensor) {
    return tensor.is_floating_point() ? tensor.to(dtype) : tensor;
  });
}

Batch Batch::pin_memory() const {
  return apply([](const at::Tensor& tensor) {
    return tensor.device().is_cpu() && !tensor.is_pinned() ? tensor.pin_memory() : tensor;
  });
}

Batch Batch::slice(int64_t begin, int64_t end) const {
  return apply([&](const at::Tensor& tensor) {
    return tensor.dim() > 0 ? tensor.slice(0, begin, end) : tensor;
  });
}

Batch Batch::detach() const {
  return apply([](const at::Tensor& tensor) { return tensor.detach(); });
}

std::optional<int64_t> Batch::batch_size(bool* ambiguous) const {
  std::optional<int64_t> size;
  for_each_tensor([&](const at::Tensor& tensor) {
    const int64_t rows = tensor.dim() > 0 ? tensor.size(0) : 1;
    if (size && *size != rows && ambiguous != nullptr) *ambiguous = true;
    if (!size) size = rows;
  });
  return size;
}

std::string Batch::describe() const {
  if (is_tensor()) {
    const auto& tensor = std::get<at::Tensor>(value_);
    if (!tensor.defined()) return "an undefined tensor";
    return str(dtype_name(tensor.scalar_type()), " ", tensor.sizes());
  }
  std::vector<std::string> parts;
  if (is_list()) {
    for (const auto& item : as_list()) parts.push_back(item.describe());
    return "[" + join(parts) + "]";
  }
  if (is_map()) {
    for (const auto& [key, item] : as_map()) parts.push_back(key + ": " + item.describe());
    return "{" + join(parts) + "}";
  }
  if (const auto* value = std::get_if<bool>(&value_)) return *value ? "true" : "false";
  if (const auto* value = std::get_if<int64_t>(&value_)) return str(*value);
  if (const auto* value = std::get_if<double>(&value_)) return str(*value);
  if (const auto* value = std::get_if<std::string>(&value_)) return '"' + *value + '"';
  return "none";
}

StepOutput::StepOutput(Batch value) {
  if (value.is_tensor()) {
    loss_ = value.tensor();
    return;
  }
  if (value.contains("loss") && value.at("loss").is_tensor()) loss_ = value["loss"];
  extra_ = std::move(value);
}

StepOutput StepOutput::with_loss(at::Tensor loss) const {
  StepOutput output;
  output.extra_ = extra_;
  if (extra_.is_map()) output.extra_.set("loss", loss);
  output.loss_ = std::move(loss);
  return output;
}

}  // namespace lightning
