// Regions: stretches of forward whose intermediate tensors are dropped and computed anew in
// backward (activation checkpointing), without a call into the model.
//
// While a region is recorded the thread's operators are seen below autograd and autocast, with
// where each argument came from; what autograd would save of the region's own tensors is dropped.
// The first of these that backward asks for replays what they need, once, with the generators as
// they were; so gradients are those of an ordinary backward, bit for bit. What comes from outside
// of the region (its inputs, parameters) is held as autograd holds it: a sharded parameter takes
// no memory, and a replay touches it like forward.
//
// In-place operators are replayed in their order. One that writes a tensor from outside (a residual
// stream, running statistics, a cache) keeps a copy of what it overwrites; the replay works on the
// copy, so nothing outside is written twice. Tensors that are filled by their address stay, as
// far as that can be seen: what a factory makes on the CPU, and what `empty` made that is
// read before an operator wrote it. Code that writes by address into what an operator wrote before
// says keep_for_replay(); code whose tensors shall be dropped too runs in replayable().
//
// A region inside of a region is part of it. Backward ends what is being recorded.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "lightning/scope.h"

namespace lightning {

class Region;

bool recording_region();

// Starts recording on this thread; nothing where a region is recorded already. end_region() or the
// next backward ends it.
//   name   for errors
void begin_region(const std::string& name);
void end_region();

// Records while it lives; ends what it began.
Scope region_scope(const std::string& name);

// While a region is recorded: this tensor is held as autograd would, for it was written by its
// address. No effect otherwise.
void keep_for_replay(const at::Tensor& tensor);

// Runs a function of tensors that does its work without operators (kernels called by address), so
// that a region replays it like one operator. It must give the same results for the same inputs,
// and write nothing else. Parameters among the inputs are made whole for a replay; the first time
// the caller has done that.
std::vector<at::Tensor> replayable(
    const std::vector<at::Tensor>& inputs,
    const std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>&)>& function);

// Likewise one that fills tensors which are there already, as kernels write into what `empty` made.
// An undefined tensor stays one. `outputs` may be read too, where they were written before.
using FillingFunction = std::function<void(const std::vector<at::Tensor>& inputs,
                                           const std::vector<at::Tensor>& outputs)>;
void replayable(const std::vector<at::Tensor>& inputs, const std::vector<at::Tensor>& outputs,
                const FillingFunction& function);

// What regions did since the last call, for tests and profiles.
struct RegionCounts {
  int64_t recorded = 0;  // regions
  int64_t dropped = 0;   // saved tensors
  int64_t kept = 0;      // saved tensors, as from outside
  int64_t replayed = 0;  // regions
};
RegionCounts take_region_counts();

}  // namespace lightning
