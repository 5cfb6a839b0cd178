// The dtype that tensors are created in, changed for as long as a scope lives.
#pragma once

#include <c10/core/ScalarType.h>

#include "lightning/scope.h"

namespace lightning {

// Puts back what was there before, also when an exception passes.
// Source: Lightning 2.6, `_DtypeContextManager`.
Scope default_dtype_scope(at::ScalarType dtype);

}  // namespace lightning
