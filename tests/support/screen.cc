#include "tests/support/screen.h"

#include <algorithm>
#include <cstdlib>

namespace lightning::testing {

void Screen::write(const std::string& bytes) {
  writes_.push_back(bytes);
  for (size_t i = 0; i < bytes.size();) {
    const auto byte = static_cast<unsigned char>(bytes[i]);
    const size_t length = byte < 0x80 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
    if (byte == '\r') {
      column_ = 0;
    } else if (byte == '\n') {
      column_ = 0;
      if (++row_ == cells_.size()) cells_.emplace_back();
    } else if (byte == 0x1B && i + 1 < bytes.size() && bytes[i + 1] == '[') {
      i += escape(bytes, i);
      continue;
    } else {
      put(bytes.substr(i, length));
    }
    i += length;
  }
}

void Screen::put(const std::string& character) {
  if (terminal_ && column_ >= static_cast<size_t>(columns_)) write("\n"), writes_.pop_back();
  auto& row = cells_[row_];
  if (row.size() < column_ + 1) row.resize(column_ + 1, " ");
  row[column_] = character;
  column_ += static_cast<size_t>(std::max(1, display_width(character)));
}

size_t Screen::escape(const std::string& bytes, size_t at) {
  const size_t end = bytes.find_first_of("ABCDHJKm", at + 2);
  if (end == std::string::npos) return bytes.size() - at;
  const auto number = static_cast<size_t>(std::max(1, std::atoi(bytes.c_str() + at + 2)));
  switch (bytes[end]) {
    case 'A':
      row_ -= std::min(row_, number);
      break;
    case 'K':
      if (cells_[row_].size() > column_) cells_[row_].resize(column_);
      break;
    case 'J':
      if (cells_[row_].size() > column_) cells_[row_].resize(column_);
      cells_.resize(row_ + 1);
      break;
    case 'm':
      break;
    default:
      put("?" + bytes.substr(at + 1, end - at));
  }
  return end + 1 - at;
}

std::vector<std::string> Screen::lines() const {
  std::vector<std::string> out;
  for (const auto& row : cells_) {
    std::string line;
    for (const auto& cell : row) line += cell;
    const auto end = line.find_last_not_of(' ');
    out.push_back(line.substr(0, end == std::string::npos ? 0 : end + 1));
  }
  while (!out.empty() && out.back().empty()) out.pop_back();
  return out;
}

std::string Screen::bytes() const {
  std::string all;
  for (const auto& one : writes_) all += one;
  return all;
}

}  // namespace lightning::testing
