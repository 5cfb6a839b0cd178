// Numbers of the zip format, as its reader and its writer need them.
// Source: PKWARE, APPNOTE.TXT 6.3.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lightning::zip_format {

inline constexpr uint32_t kLocalHeader = 0x04034b50;  // PK\3\4
inline constexpr uint32_t kDescriptor = 0x08074b50;   // PK\7\8
inline constexpr uint32_t kEntry = 0x02014b50;        // PK\1\2, of the central directory
inline constexpr uint32_t kEnd64 = 0x06064b50;        // PK\6\6
inline constexpr uint32_t kLocator64 = 0x07064b50;    // PK\6\7
inline constexpr uint32_t kEnd = 0x06054b50;          // PK\5\6

inline constexpr uint64_t kLocalHeaderBytes = 30;
inline constexpr uint64_t kEntryBytes = 46;
inline constexpr uint64_t kEnd64Bytes = 56;
inline constexpr uint64_t kLocator64Bytes = 20;
inline constexpr uint64_t kEndBytes = 22;
inline constexpr uint64_t kMostComment = 0xffff;

inline constexpr uint16_t kEncrypted = 0x0001;
inline constexpr uint16_t kHasDescriptor = 0x0008;  // CRC and sizes stand behind the data
inline constexpr uint16_t kStrongEncryption = 0x0040;
inline constexpr uint16_t kUtf8 = 0x0800;
inline constexpr uint16_t kMaskedHeader = 0x2000;

inline constexpr uint16_t kZip64Extra = 0x0001;
// Stands where the number is in the zip64 extra, or in the zip64 end.
inline constexpr uint32_t kIn64 = 0xffffffff;
inline constexpr uint16_t kIn64Short = 0xffff;

// Little-endian numbers at any address.
inline uint16_t get16(const uint8_t* p) { return static_cast<uint16_t>(p[0] | p[1] << 8); }
inline uint32_t get32(const uint8_t* p) {
  return static_cast<uint32_t>(get16(p)) | static_cast<uint32_t>(get16(p + 2)) << 16;
}
inline uint64_t get64(const uint8_t* p) {
  return static_cast<uint64_t>(get32(p)) | static_cast<uint64_t>(get32(p + 4)) << 32;
}

}  // namespace lightning::zip_format
