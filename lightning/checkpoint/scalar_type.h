// The element types of the formats as LibTorch's.
#pragma once

#include <c10/core/ScalarType.h>

#include <optional>

#include "lightning/checkpoint/dtype.h"

namespace lightning {

c10::ScalarType scalar_type(DType dtype);
// Nothing for types that no format here holds: quantized, of less than a byte.
std::optional<DType> dtype_of(c10::ScalarType type);

}  // namespace lightning
