// README.md shows a program that is compiled, word for word.
#include <catch2/catch.hpp>

#include "lightning/files.h"

TEST_CASE("the program in README.md is the one in examples/", "[docs]") {
  const auto readme = lightning::read_file("README.md");
  const auto program = lightning::read_file("examples/first_steps/main.cc");
  CHECK(readme.find("```cpp\n" + program + "```") != std::string::npos);
}
