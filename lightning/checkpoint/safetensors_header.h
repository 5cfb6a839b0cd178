// The header of a safetensors file, as text and parsed. Trusts nothing that it reads, and needs no
// LibTorch.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "lightning/checkpoint/dtype.h"

namespace lightning {

struct SafetensorsHeader {
  struct Entry {
    std::string name;
    DType dtype = DType::kFloat32;
    // Two 4-bit numbers in each element, as LibTorch has them; `dtype` is then kUInt8. The file
    // counts the numbers.
    bool is_packed = false;
    std::vector<int64_t> sizes;  // of elements
    uint64_t begin = 0;          // of the data; in the file's terms, from the end of the header
    uint64_t end = 0;
  };
  std::vector<Entry> entries;  // in the order of their data
  std::map<std::string, std::string> metadata;

  // Python's reader takes no longer one.
  static constexpr uint64_t kMostBytes = 100'000'000;

  // Errors: CheckpointError for a text that is not UTF-8 and for a header that gets too long.
  std::string to_json() const;

  // Errors: CheckpointError that says what is wrong, without the file's name.
  //
  //   data_bytes   how many bytes follow the header; the entries must cover them exactly
  static SafetensorsHeader parse(std::string_view json, uint64_t data_bytes);

  // Those of the format, by torch's names.
  static std::string known_dtypes();
};

}  // namespace lightning
