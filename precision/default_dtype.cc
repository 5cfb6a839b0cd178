#include "precision/default_dtype.h"

#include <c10/core/DefaultDtype.h>
#include <c10/core/ScalarTypeToTypeMeta.h>

namespace lightning {

Scope default_dtype_scope(at::ScalarType dtype) {
  const auto before = c10::get_default_dtype();
  auto scope = scope_exit([before] { c10::set_default_dtype(before); });
  c10::set_default_dtype(c10::scalarTypeToTypeMeta(dtype));
  return scope;
}

}  // namespace lightning
