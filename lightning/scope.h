// Something that holds while it is alive: a forward context, a blocked gradient reduction.
#pragma once

#include <memory>
#include <utility>

namespace lightning {

// Empty where nothing needs to be undone, which then costs nothing.
using Scope = std::shared_ptr<void>;

// A scope that runs `undo` at its end.
template <class F>
Scope scope_exit(F undo) {
  return Scope(nullptr, [undo = std::move(undo)](std::nullptr_t) mutable { undo(); });
}

// A scope that keeps a guard of LibTorch's alive: `make_scope<at::NoGradGuard>()`.
template <class Guard, class... Args>
Scope make_scope(Args&&... args) {
  return std::make_shared<Guard>(std::forward<Args>(args)...);
}

// Ends `inner` before `outer`.
inline Scope both(Scope inner, Scope outer) {
  return scope_exit([inner = std::move(inner), outer = std::move(outer)]() mutable {
    inner.reset();
    outer.reset();
  });
}

}  // namespace lightning
