// Runs what reads checkpoints without LibTorch over bytes that may be anything, and checks what was
// read. Part of a program that was compiled with the address sanitizer; the bytes lie between
// others that it guards, so that reading one too many ends the program.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

#include "tests/fuzz/input.h"

namespace lightning::fuzz {

// A reader did what it promises not to do.
class Violation : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

// At most this much is allocated at a time for an input of so many bytes.
inline constexpr uint64_t kMostBytesPerByte = 200;
inline constexpr uint64_t kMostBytesBeside = uint64_t{1} << 20;

// Reads the bytes as this format and walks through all that came of it.
// Errors: Violation for an exception other than CheckpointError, for more memory than the above,
// and for claims that do not hold: a tensor that leaves its record, a node that is not what its
// kind says, metadata that comes back from its own pickle as another.
Outcome fuzz_one(Format format, std::string_view bytes);

}  // namespace lightning::fuzz
