// A terminal without glass: takes what a program writes and tells what a person would see.
#pragma once

#include <string>
#include <vector>

#include "lightning/terminal.h"

namespace lightning::testing {

class Screen : public Output {
 public:
  explicit Screen(int columns = 100, bool terminal = true)
      : columns_(columns), terminal_(terminal) {}

  void write(const std::string& bytes) override;
  bool is_terminal() const override { return terminal_; }
  int columns() const override { return columns_; }
  int rows() const override { return terminal_ ? 24 : 0; }

  // What stands there, without spaces at the ends of lines and empty lines at the end. Lines that
  // scrolled away are kept. Understands text, \r, \n, colours (left out), cursor up, and clearing
  // to the end of the line and of the screen; anything else shows as it is.
  std::vector<std::string> lines() const;
  // All the bytes, as they came; each write by itself.
  const std::vector<std::string>& writes() const { return writes_; }
  std::string bytes() const;
  size_t cursor_row() const { return row_; }
  size_t cursor_column() const { return column_; }

 private:
  std::vector<std::vector<std::string>> cells_ = {{}};  // a wide character and an empty cell
  size_t row_ = 0, column_ = 0;
  int columns_;
  bool terminal_;
  std::vector<std::string> writes_;

  void put(const std::string& character);
  size_t escape(const std::string& bytes, size_t at);
};

}  // namespace lightning::testing
