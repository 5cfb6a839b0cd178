#include "lightning/checkpoint/dtype.h"

namespace lightning {
namespace {

// In the order of DType.
constexpr DTypeInfo kDTypes[] = {
    {DType::kFloat32, 4, "float32", "FloatStorage", "F32"},
    {DType::kFloat64, 8, "float64", "DoubleStorage", "F64"},
    {DType::kFloat16, 2, "float16", "HalfStorage", "F16"},
    {DType::kBFloat16, 2, "bfloat16", "BFloat16Storage", "BF16"},
    {DType::kInt64, 8, "int64", "LongStorage", "I64"},
    {DType::kInt32, 4, "int32", "IntStorage", "I32"},
    {DType::kInt16, 2, "int16", "ShortStorage", "I16"},
    {DType::kInt8, 1, "int8", "CharStorage", "I8"},
    {DType::kUInt8, 1, "uint8", "ByteStorage", "U8"},
    {DType::kUInt16, 2, "uint16", "", "U16"},
    {DType::kUInt32, 4, "uint32", "", "U32"},
    {DType::kUInt64, 8, "uint64", "", "U64"},
    {DType::kBool, 1, "bool", "BoolStorage", "BOOL"},
    {DType::kComplex32, 4, "complex32", "", ""},
    {DType::kComplex64, 8, "complex64", "ComplexFloatStorage", "C64"},
    {DType::kComplex128, 16, "complex128", "ComplexDoubleStorage", ""},
    {DType::kFloat8E4M3FN, 1, "float8_e4m3fn", "", "F8_E4M3"},
    {DType::kFloat8E5M2, 1, "float8_e5m2", "", "F8_E5M2"},
    {DType::kFloat8E4M3FNUZ, 1, "float8_e4m3fnuz", "", "F8_E4M3FNUZ"},
    {DType::kFloat8E5M2FNUZ, 1, "float8_e5m2fnuz", "", "F8_E5M2FNUZ"},
    {DType::kFloat8E8M0FNU, 1, "float8_e8m0fnu", "", "F8_E8M0"},
};

constexpr bool in_order() {
  size_t i = 0;
  for (const auto& known : kDTypes) {
    if (static_cast<size_t>(known.dtype) != i++) return false;
  }
  return i == static_cast<size_t>(DType::kFloat8E8M0FNU) + 1;
}
static_assert(in_order(), "info() takes the dtype as the place in the table");

std::optional<DType> find(std::string_view DTypeInfo::*column, std::string_view name) {
  if (name.empty()) return std::nullopt;  // what a format lacks is empty in the table
  for (const auto& known : kDTypes) {
    if (known.*column == name) return known.dtype;
  }
  return std::nullopt;
}

}  // namespace

const DTypeInfo& info(DType dtype) { return kDTypes[static_cast<size_t>(dtype)]; }

std::optional<DType> dtype_of_torch_name(std::string_view name) {
  return find(&DTypeInfo::torch_name, name);
}

std::optional<DType> dtype_of_storage(std::string_view name) {
  return find(&DTypeInfo::storage, name);
}

std::optional<DType> dtype_of_safetensors(std::string_view name) {
  return find(&DTypeInfo::safetensors, name);
}

}  // namespace lightning
