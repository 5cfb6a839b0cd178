// Entry into a method of a user's model, the one way in for the loops and for Fabric: what the
// strategy and the precision hold around it. Fabric converts inputs and outputs too; the Trainer
// converts inputs before the transfer hooks and leaves outputs alone.
#pragma once

#include <utility>

#include "lightning/precision.h"
#include "lightning/strategy.h"

namespace lightning {

template <class Method>
auto enter_method(Strategy& strategy, Method&& method) {
  const Scope step = strategy.step_scope();
  const Scope norms = strategy.batch_norm_scope();
  const Scope forward = strategy.precision().forward_context();
  return std::forward<Method>(method)();
}

// As above, from a batch in any dtype to an output in the default one.
template <class Method>
Batch enter_converted(Strategy& strategy, const Batch& input, Method&& method) {
  auto& precision = strategy.precision();
  const Batch converted = precision.convert_call_input(input);
  return precision.convert_output(
      enter_method(strategy, [&] { return Batch(std::forward<Method>(method)(converted)); }));
}

}  // namespace lightning
