// Whoever draws on the terminal takes lines that others print, so that they do not tear its
// drawing.
//
// Trainer::print() and module.print() give their lines to the callback that is one, else to stdout.
#pragma once

#include <string>

namespace lightning {

class LinePrinter {
 public:
  virtual ~LinePrinter() = default;

  // Prints the line, with a line break after it, above what is drawn. Called on the thread that
  // called fit(), on rank 0.
  virtual void print_line(const std::string& line) = 0;
};

}  // namespace lightning
