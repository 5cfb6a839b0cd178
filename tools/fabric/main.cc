// The program `fabric`; `fabric --help` says what it does.
#include <iostream>
#include <string>
#include <vector>

#include "tools/fabric/command_line.h"

int main(int argc, char** argv) {
  const int status = lightning::tools::run_fabric(std::vector<std::string>(argv + 1, argv + argc),
                                                  std::cout, std::cerr);
  // A full disk behind the output is an error, not an empty success.
  std::cout.flush();
  return status == 0 && !std::cout ? 1 : status;
}
