#include "lightning/checkpoint/scalar_type.h"

#include <iterator>

namespace lightning {
namespace {

// In the order of DType.
constexpr c10::ScalarType kTypes[] = {
    c10::ScalarType::Float,
    c10::ScalarType::Double,
    c10::ScalarType::Half,
    c10::ScalarType::BFloat16,
    c10::ScalarType::Long,
    c10::ScalarType::Int,
    c10::ScalarType::Short,
    c10::ScalarType::Char,
    c10::ScalarType::Byte,
    c10::ScalarType::UInt16,
    c10::ScalarType::UInt32,
    c10::ScalarType::UInt64,
    c10::ScalarType::Bool,
    c10::ScalarType::ComplexHalf,
    c10::ScalarType::ComplexFloat,
    c10::ScalarType::ComplexDouble,
    c10::ScalarType::Float8_e4m3fn,
    c10::ScalarType::Float8_e5m2,
    c10::ScalarType::Float8_e4m3fnuz,
    c10::ScalarType::Float8_e5m2fnuz,
    c10::ScalarType::Float8_e8m0fnu,
};
static_assert(std::size(kTypes) == static_cast<size_t>(DType::kFloat8E8M0FNU) + 1);

}  // namespace

c10::ScalarType scalar_type(DType dtype) { return kTypes[static_cast<size_t>(dtype)]; }

std::optional<DType> dtype_of(c10::ScalarType type) {
  for (size_t i = 0; i < std::size(kTypes); ++i) {
    if (kTypes[i] == type) return static_cast<DType>(i);
  }
  return std::nullopt;
}

}  // namespace lightning
