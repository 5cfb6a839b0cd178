// 16-bit copies of float32 parameters, which the optimizer's step writes along with the parameters,
// for layers that compute in 16 bits: no step casts a weight again, and the parameter itself stays
// float32.
//
// A precision that wants them keeps a WorkingCopies and makes it the thread's own around forward
// (WorkingCopies::use); lightning/nn asks working_copy(), which makes the copy of a parameter the
// first time it is asked for; the optimizer's step writes those that are there. So parameters that
// no such layer reads cost nothing.
//
// A copy counts only while the parameter is as it was when the copy was made: whatever writes the
// parameter in between (loading, an initialiser, a user) changes its version or its storage and so
// leaves the copy unused. Writing through `parameter.data()` changes neither: such a write, as one
// that clips weights, is not seen by layers before the next step of the optimizer. Write the
// parameter itself, under a NoGradGuard.
//
// Writing a copy changes its own version, so that backward through a graph that is older than the
// optimizer's step is an error, as it is in float32. Used on one thread at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <unordered_map>
#include <vector>

#include "lightning/scope.h"

namespace lightning {

class WorkingCopies {
 public:
  explicit WorkingCopies(at::ScalarType dtype) : dtype_(dtype) {}

  at::ScalarType dtype() const { return dtype_; }

  // The copy of a parameter that a layer reads, made now where it is not current; from the first
  // time on, steps write it. Undefined for what is no leaf in float32 that takes gradients: steps
  // do not write it, or it is temporary. (Gradients may be switched off later.)
  at::Tensor want(const at::Tensor& parameter);

  // Where the step writes the copy of a parameter: of its sizes and strides, in dtype(), the same
  // each time while it does not move. Undefined for a parameter that nobody wanted.
  at::Tensor place_for(const at::Tensor& parameter);
  // Says that the copy equals the parameter now.
  void set_current(const at::Tensor& parameter);
  // The copy, where it equals the parameter now; undefined otherwise.
  at::Tensor current(const at::Tensor& parameter) const;

  // Casts into the copies of all of these that are wanted, in one pass, and makes them current.
  void refresh(const std::vector<at::Tensor>& parameters);

  size_t size() const { return copies_.size(); }
  void clear() { copies_.clear(); }

  // Makes these copies the thread's own while the scope lives; null for none.
  static Scope use(WorkingCopies* copies);

 private:
  struct Copy {
    at::Tensor parameter;  // holds the key alive
    at::Tensor copy;
    const void* data = nullptr;  // of the parameter, when the copy was made
    uint32_t version = 0;
    bool is_current = false;
  };
  static bool can_copy(const at::Tensor& parameter);
  void make_place(Copy& entry, const at::Tensor& parameter) const;

  std::unordered_map<const void*, Copy> copies_;  // by TensorImpl
  at::ScalarType dtype_;
};

// The parameter in another dtype, for reading: its working copy where the thread keeps copies of
// that dtype, else a cast; itself where it has that dtype. Without a gradient: the caller is an
// autograd function that gives the parameter's own.
at::Tensor working_copy(const at::Tensor& parameter, at::ScalarType dtype);

}  // namespace lightning
