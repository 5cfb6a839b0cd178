// Operators as the dispatcher hands them over: a stack of arguments, of which some are tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/empty.h>
#include <c10/core/StorageImpl.h>

#include <cstdint>
#include <vector>

namespace lightning {

using Stack = std::vector<c10::IValue>;

// Calls `visit(tensor, element)` for each defined tensor in an argument; element is -1 where the
// argument is no list.
template <class Visit>
void visit_tensors(const c10::IValue& value, Visit visit) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) visit(value.toTensor(), int64_t{-1});
  } else if (value.isList()) {
    int64_t element = 0;
    for (const c10::IValue& each : value.toListRef()) {
      if (each.isTensor() && each.toTensor().defined()) visit(each.toTensor(), element);
      ++element;
    }
  }
}

// How a tensor lies in its memory.
struct Shape {
  explicit Shape(const at::Tensor& tensor)
      : sizes(tensor.sizes().vec()),
        strides(tensor.strides().vec()),
        offset(tensor.storage_offset()),
        dtype(tensor.scalar_type()),
        is_all(tensor.storage_offset() == 0 && tensor.is_non_overlapping_and_dense() &&
               static_cast<size_t>(tensor.numel()) * tensor.element_size() ==
                   tensor.storage().nbytes()),
        conjugate(tensor.is_conj()),
        negative(tensor.is_neg()) {}

  // A tensor of this shape in other memory.
  at::Tensor over(const c10::Storage& storage) const {
    auto tensor = at::empty({0}, at::TensorOptions().dtype(dtype).device(storage.device()));
    tensor.set_(storage, offset, sizes, strides);
    tensor._set_conj(conjugate);
    tensor._set_neg(negative);
    return tensor;
  }

  std::vector<int64_t> sizes, strides;
  int64_t offset;
  at::ScalarType dtype;
  bool is_all;  // of its memory
  bool conjugate, negative;
};

}  // namespace lightning
