// Models that are born empty. While a model is constructed under DeferredInit::record(), its
// tensors are meta tensors without memory, and what the constructors do to them (empty, uniform_,
// copy_, arithmetic) is recorded in place of being done: a model of billions of parameters is
// there in milliseconds. materialize() does the recorded work later, tensor after tensor, so that
// no more than one needs to be in memory at a time, with the same generator: values are, bit for
// bit, those of an ordinary construction with the same seed on the same kind of device.
// What is overwritten later is not computed; draws for it are made and thrown away.
//
//   DeferredInit deferred(device);
//   {
//     const Scope scope = deferred.record();
//     model = std::make_shared<Model>();
//   }
//   deferred.materialize(*model);   // or: deferred.materialize(tensors, take)
//
// Nothing of the model changes: any initialiser made of operators works, as do views, tied weights
// and buffers. A constructor that asks for a value (item(), a comparison) gets it: what the value
// depends on is computed on the spot. Tensors made of literals (torch::tensor({1, 2})) and tensors
// from elsewhere are real. A constructor that writes a tensor by its address (accessor, data_ptr)
// gets LibTorch's "data is not allocated yet": such a model is constructed in the ordinary way.
//
// Used on the thread that constructs. default_device_scope() is for models that shall have values
// at once.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "lightning/fwd.h"
#include "lightning/scope.h"

namespace lightning {

class DeferredInit {
 public:
  //   device   where the tensors will be, whatever device the constructors name
  explicit DeferredInit(at::Device device = at::kCPU);
  ~DeferredInit();
  DeferredInit(const DeferredInit&) = delete;
  DeferredInit& operator=(const DeferredInit&) = delete;

  // May be opened again, to construct more: draws then go on where they were, or begin where a
  // generator was seeded or used since. What converts the model (Module::to) belongs in it too.
  // Errors: MisconfigurationError inside of another's.
  Scope record();

  // True for a tensor of this construction that has no values yet.
  bool is_deferred(const at::Tensor& tensor) const;

  // Whether somebody holds such a tensor.
  bool is_pending() const;

  // Gives the values of deferred tensors, each as soon as it is complete, and forgets them. Others
  // are passed over. All draws of the construction are made, so that generators end as they would
  // have; a generator that was used or seeded since stays as it is.
  //   take   called with the tensor and its values, without a gradient
  using Take = std::function<void(const at::Tensor& tensor, at::Tensor values)>;
  void materialize(const std::vector<at::Tensor>& tensors, const Take& take);

  // All parameters and buffers of the module, in place: the tensors stay the same objects.
  // Errors: MisconfigurationError for one on the meta device that was not recorded.
  void materialize(torch::nn::Module& module);

  // Operators recorded.
  int64_t size() const;

  class Tape;

 private:
  std::unique_ptr<Tape> tape_;
};

// While alive tensors that this thread makes by an operator which is told no device are made on
// this one, as with Python's `with torch.device(...)`. Tensors made of literals stay on the CPU.
// Inside of DeferredInit::record() it has no effect.
Scope default_device_scope(at::Device device);

}  // namespace lightning
