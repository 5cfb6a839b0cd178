// The wire format of protocol buffers, as far as event files need it: a message is the string that
// its fields append to.
//
// It is our own because LibTorch links a protobuf of another version than Debian's, and two of them
// in one process clash.
// Source: https://protobuf.dev/programming-guides/encoding
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace lightning::protobuf {

inline void varint(std::string& out, uint64_t value) {
  for (; value >= 0x80; value >>= 7) out += static_cast<char>(value | 0x80);
  out += static_cast<char>(value);
}

template <class T>
void little_endian(std::string& out, T value) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "numbers are copied as they are");
  char bytes[sizeof(T)];
  std::memcpy(bytes, &value, sizeof(T));
  out.append(bytes, sizeof(T));
}

enum WireType : uint32_t { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };

inline void key(std::string& out, uint32_t field, WireType type) {
  varint(out, (field << 3) | type);
}

// Fields of value 0 are left out, as proto3 does; the `_always` forms are for members of a oneof.
inline void integer_always(std::string& out, uint32_t field, int64_t value) {
  key(out, field, kVarint);
  varint(out, static_cast<uint64_t>(value));
}
inline void integer(std::string& out, uint32_t field, int64_t value) {
  if (value != 0) integer_always(out, field, value);
}
inline void number_always(std::string& out, uint32_t field, double value) {
  key(out, field, kFixed64);
  little_endian(out, value);
}
inline void number(std::string& out, uint32_t field, double value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));  // -0.0 is not the default
  if (bits != 0) number_always(out, field, value);
}
inline void float_always(std::string& out, uint32_t field, float value) {
  key(out, field, kFixed32);
  little_endian(out, value);
}

// Text, bytes and messages.
inline void bytes(std::string& out, uint32_t field, const std::string& value) {
  key(out, field, kBytes);
  varint(out, value.size());
  out += value;
}
inline void text(std::string& out, uint32_t field, const std::string& value) {
  if (!value.empty()) bytes(out, field, value);
}

inline void packed_doubles(std::string& out, uint32_t field, const std::vector<double>& values) {
  if (values.empty()) return;
  key(out, field, kBytes);
  varint(out, values.size() * sizeof(double));
  for (const double value : values) little_endian(out, value);
}

}  // namespace lightning::protobuf
