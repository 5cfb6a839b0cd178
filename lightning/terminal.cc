#include "lightning/terminal.h"

#include <poll.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>

namespace lightning {
namespace {

struct Range {
  uint32_t first, last;
};

// Unicode 15's wide and fullwidth blocks, and those of marks that take no column of their own;
// coarse where a block is all of one kind.
constexpr Range kWide[] = {
    {0x1100, 0x115F},   {0x231A, 0x231B},   {0x2329, 0x232A},   {0x23E9, 0x23EC},
    {0x23F0, 0x23F0},   {0x23F3, 0x23F3},   {0x25FD, 0x25FE},   {0x2614, 0x2615},
    {0x2648, 0x2653},   {0x267F, 0x267F},   {0x2693, 0x2693},   {0x26A1, 0x26A1},
    {0x26AA, 0x26AB},   {0x26BD, 0x26BE},   {0x26C4, 0x26C5},   {0x26CE, 0x26CE},
    {0x26D4, 0x26D4},   {0x26EA, 0x26EA},   {0x26F2, 0x26F3},   {0x26F5, 0x26F5},
    {0x26FA, 0x26FA},   {0x26FD, 0x26FD},   {0x2705, 0x2705},   {0x270A, 0x270B},
    {0x2728, 0x2728},   {0x274C, 0x274C},   {0x274E, 0x274E},   {0x2753, 0x2755},
    {0x2757, 0x2757},   {0x2795, 0x2797},   {0x27B0, 0x27B0},   {0x2B1B, 0x2B1C},
    {0x2B50, 0x2B50},   {0x2B55, 0x2B55},   {0x2E80, 0x303E},   {0x3041, 0xA4CF},
    {0xA960, 0xA97C},   {0xAC00, 0xD7A3},   {0xF900, 0xFAFF},   {0xFE30, 0xFE6F},
    {0xFF00, 0xFF60},   {0xFFE0, 0xFFE6},   {0x1F004, 0x1F004}, {0x1F0CF, 0x1F0CF},
    {0x1F18E, 0x1F18E}, {0x1F191, 0x1F19A}, {0x1F200, 0x1F320}, {0x1F32D, 0x1F335},
    {0x1F337, 0x1F37C}, {0x1F37E, 0x1F393}, {0x1F3A0, 0x1F3CA}, {0x1F3CF, 0x1F3D3},
    {0x1F3E0, 0x1F3F0}, {0x1F3F4, 0x1F3F4}, {0x1F3F8, 0x1F43E}, {0x1F440, 0x1F440},
    {0x1F442, 0x1F4FC}, {0x1F4FF, 0x1F53D}, {0x1F54B, 0x1F567}, {0x1F57A, 0x1F57A},
    {0x1F595, 0x1F596}, {0x1F5A4, 0x1F5A4}, {0x1F5FB, 0x1F64F}, {0x1F680, 0x1F6C5},
    {0x1F6CC, 0x1F6CC}, {0x1F6D0, 0x1F6FC}, {0x1F7E0, 0x1F7F0}, {0x1F90C, 0x1FAFF},
    {0x20000, 0x3FFFD}};
constexpr Range kZero[] = {{0x0300, 0x036F}, {0x0483, 0x0489}, {0x0591, 0x05BD}, {0x0610, 0x061A},
                           {0x064B, 0x065F}, {0x200B, 0x200F}, {0x202A, 0x202E}, {0x2060, 0x2064},
                           {0x20D0, 0x20F0}, {0xFE00, 0xFE0F}, {0xFE20, 0xFE2F}, {0xFEFF, 0xFEFF}};

template <size_t N>
bool within(const Range (&ranges)[N], uint32_t code) {
  const auto* range = std::upper_bound(
      ranges, ranges + N, code, [](uint32_t value, const Range& r) { return value < r.first; });
  return range != ranges && code <= range[-1].last;
}

// One character, or one escape sequence of width 0.
struct Glyph {
  size_t bytes;
  int width;
  bool escape;
};

Glyph glyph_at(const std::string& text, size_t i) {
  const auto byte = [&](size_t k) {
    return k < text.size() ? static_cast<unsigned char>(text[k]) : 0u;
  };
  const unsigned lead = byte(i);
  if (lead == 0x1B && byte(i + 1) == '[') {
    size_t end = i + 2;
    while (end < text.size() && (byte(end) < 0x40 || byte(end) > 0x7E)) ++end;
    return {std::min(end + 1, text.size()) - i, 0, true};
  }
  if (lead < 0x80) return {1, lead >= 0x20 && lead != 0x7F ? 1 : 0, false};
  const size_t length = lead < 0xC0 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  uint32_t code = length == 1 ? lead : lead & (0xFFu >> (length + 1));
  for (size_t k = 1; k < length; ++k) code = code << 6 | (byte(i + k) & 0x3F);
  const int width = within(kZero, code) ? 0 : within(kWide, code) ? 2 : 1;
  return {std::min(length, text.size() - i), width, false};
}

int size_of(int fd, unsigned short winsize::*side, const char* variable) {
  winsize size{};
  if (ioctl(fd, TIOCGWINSZ, &size) == 0 && size.*side > 0) return size.*side;
  const char* text = std::getenv(variable);
  return text == nullptr ? 0 : std::max(0, std::atoi(text));
}

}  // namespace

void FileOutput::write(const std::string& bytes) {
  if (fd_ == STDOUT_FILENO) {
    std::cout.flush();
    std::fflush(stdout);
  }
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t n = ::write(fd_, bytes.data() + done, bytes.size() - done);
    if (n >= 0) {
      done += static_cast<size_t>(n);
    } else if (errno == EAGAIN) {
      pollfd ready{fd_, POLLOUT, 0};
      ::poll(&ready, 1, 1000);
    } else if (errno != EINTR) {
      return;
    }
  }
}

bool FileOutput::is_terminal() const {
  const char* kind = std::getenv("TERM");
  return isatty(fd_) == 1 && (kind == nullptr || std::strcmp(kind, "dumb") != 0);
}

int FileOutput::columns() const { return size_of(fd_, &winsize::ws_col, "COLUMNS"); }
int FileOutput::rows() const { return size_of(fd_, &winsize::ws_row, "LINES"); }

std::shared_ptr<Output> standard_output() {
  static const auto output = std::make_shared<FileOutput>(STDOUT_FILENO);
  return output;
}

int display_width(const std::string& text) {
  int width = 0;
  for (size_t i = 0; i < text.size();) {
    const Glyph glyph = glyph_at(text, i);
    width += glyph.width;
    i += glyph.bytes;
  }
  return width;
}

std::string trim_to_width(const std::string& text, int width) {
  bool styled = false;
  for (size_t i = 0; i < text.size();) {
    const Glyph glyph = glyph_at(text, i);
    if (glyph.width > width) return text.substr(0, i) + (styled ? "\x1b[0m" : "");
    styled = styled || glyph.escape;
    width -= glyph.width;
    i += glyph.bytes;
  }
  return text;
}

std::string repeat(const std::string& unit, int count) {
  std::string out;
  for (int i = 0; i < count; ++i) out += unit;
  return out;
}

std::string pad_right(const std::string& text, int width) {
  return text + repeat(" ", width - display_width(text));
}

std::string pad_left(const std::string& text, int width) {
  return repeat(" ", width - display_width(text)) + text;
}

std::string center(const std::string& text, int width) {
  const int spaces = std::max(0, width - display_width(text));
  return repeat(" ", spaces / 2) + text + repeat(" ", spaces - spaces / 2);
}

}  // namespace lightning
