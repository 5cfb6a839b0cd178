// The bodies of messages between ranks: numbers of eight bytes, the lowest first, and texts after
// their length.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace lightning {

void put_number(std::string& out, int64_t number);
void put_text(std::string& out, const std::string& text);

// Reads what put_ wrote, in that order. A body that ends early gives zeros and no text.
class MessageReader {
 public:
  //   bytes   outlives this
  explicit MessageReader(const std::string& bytes) : bytes_(bytes) {}

  int64_t number();
  std::string text();
  bool at_end() const { return place_ == bytes_.size(); }

 private:
  const std::string& bytes_;
  size_t place_ = 0;
};

}  // namespace lightning
