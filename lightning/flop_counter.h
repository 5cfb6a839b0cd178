// Counts the floating-point operations of a forward, by submodule.
//
// Matrix products, convolutions and scaled dot product attention are counted, a multiplication and
// an addition each; everything else counts nothing, as in torch.utils.flop_counter. The operators
// are seen where they are dispatched, so no module needs hooks. An operator belongs to the
// submodule whose parameter it reads; one that reads none (the products within attention) to the
// smallest submodule that holds both the parameter read before and the one read after it.
// Source: torch 2.11, `torch.utils.flop_counter`.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>

#include "lightning/fwd.h"

namespace lightning {

// FLOPs of one forward by the full name of the submodule, all that is below it included; "" has the
// whole.
using FlopCounts = std::map<std::string, int64_t>;

// Calls `forward` once, on this thread. Its exceptions leave the count.
FlopCounts count_flops(const torch::nn::Module& module, const std::function<void()>& forward);

}  // namespace lightning
