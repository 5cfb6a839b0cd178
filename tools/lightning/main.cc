// The program `lightning`; `lightning --help` says what it does.
#include <iostream>
#include <string>
#include <vector>

#include "tools/lightning/command_line.h"

int main(int argc, char** argv) {
  const int status =
      lightning::tools::run(std::vector<std::string>(argv + 1, argv + argc), std::cout, std::cerr);
  // A full disk behind the output is an error, not an empty success.
  std::cout.flush();
  return status == 0 && !std::cout ? 1 : status;
}
