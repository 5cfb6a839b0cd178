// Text as pickles hold it. Needs no LibTorch.
#pragma once

#include <cstddef>
#include <string_view>

namespace lightning {

// The offset of the first byte that is not part of a character of UTF-8; the size where all are.
// Takes lone surrogates, which Python writes and reads in pickles.
size_t first_invalid_utf8(std::string_view text);

}  // namespace lightning
