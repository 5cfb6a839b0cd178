// Where bars and tables are drawn: a terminal, a file, or whatever a test puts in their place.
#pragma once

#include <memory>
#include <string>

namespace lightning {

class Output {
 public:
  virtual ~Output() = default;

  // Writes all bytes at once, after what the program's own streams hold back. A reader that is gone
  // is no error: a run does not end because nobody watches it.
  virtual void write(const std::string& bytes) = 0;
  // Whether a cursor can be moved there.
  virtual bool is_terminal() const = 0;
  // As of now; a terminal's window changes while a run goes on. 0 when not known.
  virtual int columns() const = 0;
  virtual int rows() const = 0;
};

// An open file descriptor, which the caller keeps open. It counts as a terminal when it is one and
// TERM is not "dumb". The environment's COLUMNS and LINES stand in where the device tells no size.
class FileOutput : public Output {
 public:
  explicit FileOutput(int fd) : fd_(fd) {}

  void write(const std::string& bytes) override;
  bool is_terminal() const override;
  int columns() const override;
  int rows() const override;

 private:
  int fd_;
};

// File descriptor 1.
std::shared_ptr<Output> standard_output();

// Columns that UTF-8 text takes on a terminal: 2 for East Asian wide characters and emoji, 0 for
// combining ones and for escape sequences.
int display_width(const std::string& text);

// The longest beginning that takes at most `width` columns. Escape sequences end with a reset.
std::string trim_to_width(const std::string& text, int width);

// `text` with spaces after it (before it; on both sides, the odd one after it) up to `width`.
std::string pad_right(const std::string& text, int width);
std::string pad_left(const std::string& text, int width);
std::string center(const std::string& text, int width);

// `count` times `unit`.
std::string repeat(const std::string& unit, int count);

}  // namespace lightning
