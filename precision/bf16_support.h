// Whether a device computes in bfloat16.
#pragma once

#include <c10/core/Device.h>

#include <string>

namespace lightning {

// Errors: MisconfigurationError for a GPU older than Ampere, which emulates bfloat16 more slowly
// than float32 runs, with its name and what works there.
//   precision   its name, for the message
//   instead     what to use there
void check_bf16(const std::string& precision, const std::string& instead, c10::Device device);

namespace detail {

// As above, of a GPU by its name and its compute capability, 75 for 7.5; 0 where it is not known.
void check_bf16(const std::string& precision, const std::string& instead, c10::Device device,
                const std::string& gpu, int capability);

}  // namespace detail
}  // namespace lightning
