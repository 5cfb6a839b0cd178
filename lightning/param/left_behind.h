// What a backing leaves with a parameter for those who come after it: the shards of a model outlive
// the Trainer that made them, and go with the model.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

namespace lightning {

struct LeftBehind {
  virtual ~LeftBehind() = default;
};

// With a parameter that has a backing (touch.h), for when that ends. It lives as long as the
// parameter has no other data. No effect on one that was given other data already.
//   what   must not hold the parameter's memory
void leave_behind(const at::Tensor& parameter, std::shared_ptr<LeftBehind> what);

// Null while there is a backing, and for any other tensor.
std::shared_ptr<LeftBehind> left_behind(const at::Tensor& parameter);

}  // namespace lightning
