#include "lightning/distributed/message_bytes.h"

namespace lightning {

void put_number(std::string& out, int64_t number) {
  for (int i = 0; i < 8; ++i) out += static_cast<char>(static_cast<uint64_t>(number) >> (8 * i));
}

void put_text(std::string& out, const std::string& text) {
  put_number(out, static_cast<int64_t>(text.size()));
  out += text;
}

int64_t MessageReader::number() {
  uint64_t value = 0;
  if (bytes_.size() - place_ < 8) {
    place_ = bytes_.size();
    return 0;
  }
  for (int i = 0; i < 8; ++i) {
    value |= static_cast<uint64_t>(static_cast<unsigned char>(bytes_[place_++])) << (8 * i);
  }
  return static_cast<int64_t>(value);
}

std::string MessageReader::text() {
  const auto bytes = static_cast<uint64_t>(number());
  if (bytes > bytes_.size() - place_) return "";
  place_ += bytes;
  return bytes_.substr(place_ - bytes, bytes);
}

}  // namespace lightning
