// Whether a class overrides a virtual method of its base, asked at run time: the loops skip what a
// user left out, and say so before work starts.
//
//   is_overridden(module, &LightningModule::validation_step)
//
// Reads the object's table of virtual methods, as the Itanium C++ ABI lays it out (g++ and clang on
// Linux): a pointer to a virtual member holds the offset into it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace lightning {

template <class Base, class Method>
bool is_overridden(const Base& object, Method method) {
  struct MemberPointer {
    std::intptr_t pointer;
    std::intptr_t adjustment;
  } parts{};
  static_assert(sizeof(method) == sizeof(parts), "not an Itanium C++ ABI member pointer");
  std::memcpy(&parts, &method, sizeof(parts));
#if defined(__aarch64__) || defined(__arm__)
  const std::intptr_t offset = parts.pointer;  // the lowest bit of the adjustment says "virtual"
#else
  const std::intptr_t offset = parts.pointer - 1;  // the lowest bit of the pointer says "virtual"
#endif
  const auto slot = [offset](const Base& of) {
    const char* table = nullptr;
    std::memcpy(&table, static_cast<const void*>(&of), sizeof(table));
    const void* target = nullptr;
    std::memcpy(&target, table + offset, sizeof(target));
    return target;
  };
  static const Base plain{};
  return slot(object) != slot(plain);
}

}  // namespace lightning
