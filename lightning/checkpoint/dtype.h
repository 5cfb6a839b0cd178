// The element types of the formats, without LibTorch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace lightning {

enum class DType : uint8_t {
  kFloat32,
  kFloat64,
  kFloat16,
  kBFloat16,
  kInt64,
  kInt32,
  kInt16,
  kInt8,
  kUInt8,
  kUInt16,
  kUInt32,
  kUInt64,
  kBool,
  kComplex32,
  kComplex64,
  kComplex128,
  kFloat8E4M3FN,
  kFloat8E5M2,
  kFloat8E4M3FNUZ,
  kFloat8E5M2FNUZ,
  kFloat8E8M0FNU,
};

struct DTypeInfo {
  DType dtype;
  size_t bytes;                  // of an element
  std::string_view torch_name;   // "float32", torch.float32 without the module
  std::string_view storage;      // "FloatStorage"; empty: only in an UntypedStorage
  std::string_view safetensors;  // "F32"; empty: not in that format
};

const DTypeInfo& info(DType dtype);
std::optional<DType> dtype_of_torch_name(std::string_view name);
std::optional<DType> dtype_of_storage(std::string_view name);
std::optional<DType> dtype_of_safetensors(std::string_view name);

}  // namespace lightning
