#include "lightning/flop_counter.h"

#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <unordered_map>
#include <vector>

#include "lightning/scope.h"

namespace lightning {
namespace {

using Inputs = c10::ArrayRef<const c10::IValue>;

// RecordFunction::inputs() checks a flag that only a debug LibTorch sets, and checks it wherever
// the caller is compiled without NDEBUG; so a debug build of this file could not ask a release
// LibTorch. The inputs themselves are there, at the same place in both. An explicit instantiation
// may name a private member.
Inputs inputs_of(const at::RecordFunction& record);
template <Inputs at::RecordFunction::*member>
struct Private {
  friend Inputs inputs_of(const at::RecordFunction& record) { return record.*member; }
};
template struct Private<&at::RecordFunction::inputs_>;

class Counter {
 public:
  explicit Counter(const torch::nn::Module& module) { own_parameters(module, ""); }

  void see(const std::string& op, Inputs inputs) {
    const std::string* owner = owner_of(inputs);
    if (owner != nullptr) {
      // What came between the last parameter and this one belongs to what holds both.
      add(common(last_, *owner), pending_);
      pending_ = 0;
      last_ = *owner;
    }
    const int64_t flops = flops_of(op, inputs);
    owner != nullptr ? add(*owner, flops) : void(pending_ += flops);
  }

  FlopCounts counts() {
    add(common(last_, ""), pending_);
    pending_ = 0;
    counts_[""];
    return std::move(counts_);
  }

 private:
  // The first module that holds a storage owns it; views of the parameter share the storage.
  void own_parameters(const torch::nn::Module& module, const std::string& name) {
    for (const auto& parameter : module.named_parameters(/*recurse=*/false)) {
      if (!parameter.value().defined() || !parameter.value().has_storage()) continue;
      owners_.emplace(parameter.value().storage().unsafeGetStorageImpl(), name);
    }
    for (const auto& child : module.named_children()) {
      own_parameters(*child.value(), name.empty() ? child.key() : name + "." + child.key());
    }
  }

  const std::string* owner_of(Inputs inputs) const {
    for (const auto& input : inputs) {
      if (!input.isTensor()) continue;
      const at::Tensor& tensor = input.toTensor();
      if (!tensor.defined() || !tensor.has_storage()) continue;
      const auto found = owners_.find(tensor.storage().unsafeGetStorageImpl());
      if (found != owners_.end()) return &found->second;
    }
    return nullptr;
  }

  // The longest name that both lie below or are.
  static std::string common(const std::string& a, const std::string& b) {
    size_t end = 0;
    for (size_t i = 0; i <= std::min(a.size(), b.size()); ++i) {
      const bool a_ends = i == a.size() || a[i] == '.';
      const bool b_ends = i == b.size() || b[i] == '.';
      if (a_ends && b_ends) end = i;
      if (i == a.size() || i == b.size() || a[i] != b[i]) break;
    }
    return a.substr(0, end);
  }

  void add(const std::string& name, int64_t flops) {
    if (flops == 0) return;
    counts_[""] += flops;
    for (size_t end = name.find('.'); !name.empty(); end = name.find('.', end + 1)) {
      counts_[name.substr(0, end)] += flops;
      if (end == std::string::npos) break;
    }
  }

  // -- The formulas
  // --------------------------------------------------------------------------------

  static at::IntArrayRef shape(Inputs inputs, size_t i) {
    return i < inputs.size() && inputs[i].isTensor() && inputs[i].toTensor().defined()
               ? inputs[i].toTensor().sizes()
               : at::IntArrayRef();
  }

  // [.., m, k] and [.., k, n]
  static int64_t product(at::IntArrayRef a, at::IntArrayRef b) {
    if (a.size() < 2 || b.size() < 2) return 0;
    int64_t flops = 2 * b.back();
    for (const int64_t side : a) flops *= side;
    return flops;
  }

  static int64_t attention(Inputs inputs) {
    const auto query = shape(inputs, 0), key = shape(inputs, 1), value = shape(inputs, 2);
    if (query.size() != 4 || key.size() != 4 || value.size() != 4) return 0;
    return 2 * query[0] * query[1] * query[2] * key[2] * (query[3] + value[3]);
  }

  // aten::convolution(input, weight, bias, stride, padding, dilation, transposed, ...)
  static int64_t convolution(Inputs inputs) {
    const auto input = shape(inputs, 0), weight = shape(inputs, 1);
    if (input.size() < 3 || weight.size() != input.size() || inputs.size() < 7) return 0;
    const auto stride = inputs[3].toIntVector(), padding = inputs[4].toIntVector(),
               dilation = inputs[5].toIntVector();
    const bool transposed = inputs[6].toBool();
    const auto of = [](const std::vector<int64_t>& values, size_t i) {
      return values.size() == 1 ? values[0] : values[i];
    };
    int64_t flops = 2 * input[0];
    for (const int64_t side : weight) flops *= side;
    for (size_t i = 0; i + 2 < input.size(); ++i) {
      const int64_t reach = of(dilation, i) * (weight[i + 2] - 1) + 1;
      const int64_t padded = input[i + 2] + 2 * of(padding, i);
      flops *= transposed ? input[i + 2] : (padded - reach) / of(stride, i) + 1;
    }
    return flops;
  }

  // Only the innermost of nested operators are named here, so that none is counted twice.
  static int64_t flops_of(const std::string& op, Inputs inputs) {
    if (op == "aten::mm" || op == "aten::bmm" || op == "aten::_scaled_mm" ||
        op == "lightning::gemm") {
      return product(shape(inputs, 0), shape(inputs, 1));
    }
    if (op == "aten::addmm" || op == "aten::baddbmm" || op == "aten::_addmm_activation") {
      return product(shape(inputs, 1), shape(inputs, 2));
    }
    if (op == "aten::convolution") return convolution(inputs);
    if (op == "aten::_scaled_dot_product_efficient_attention" ||
        op == "aten::_scaled_dot_product_flash_attention" ||
        op == "aten::_scaled_dot_product_flash_attention_for_cpu" ||
        op == "aten::_scaled_dot_product_cudnn_attention") {
      return attention(inputs);
    }
    return 0;
  }

  std::unordered_map<const void*, std::string> owners_;
  std::string last_;
  int64_t pending_ = 0;
  FlopCounts counts_;
};

// The callback is a plain function; what it counts into is per thread.
thread_local Counter* counting = nullptr;

}  // namespace

FlopCounts count_flops(const torch::nn::Module& module, const std::function<void()>& forward) {
  Counter counter(module);
  Counter* const outer = counting;
  counting = &counter;
  const auto handle = at::addThreadLocalCallback(
      at::RecordFunctionCallback(
          [](const at::RecordFunction& record) -> std::unique_ptr<at::ObserverContext> {
            if (counting != nullptr) counting->see(record.name(), inputs_of(record));
            return nullptr;
          })
          .needsInputs(true)
          .scopes({at::RecordScope::FUNCTION}));
  const Scope end = scope_exit([&] {
    at::removeCallback(handle);
    counting = outer;
  });
  forward();
  return counter.counts();
}

}  // namespace lightning
