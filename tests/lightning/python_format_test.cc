#include "lightning/python_format.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <sstream>

#include "lightning/errors.h"
#include "lightning/python_text.h"
#include "tests/support/python.h"

using namespace lightning;
using Catch::Contains;

TEST_CASE("numbers are formatted as Python formats them, with every specification", "[format]") {
  const double infinity = std::numeric_limits<double>::infinity();
  const std::vector<double> floats = {0.0,
                                      -0.0,
                                      0.5,
                                      1.0,
                                      -1.5,
                                      2.0 / 3.0,
                                      123456.789,
                                      1e16,
                                      1e-5,
                                      0.0001,
                                      1.25e22,
                                      100,
                                      -0.04,
                                      infinity,
                                      -infinity,
                                      std::nan(""),
                                      0.10000000149011612,
                                      999999.5,
                                      5e-324};
  const std::vector<int64_t> ints = {0, 1, -1, 7, 255, -1234567, 1000000, 9223372036854775807};
  const std::vector<std::string> specs = {
      "",       ".2f",     ".0f", "f",   "e",     ".3e",  "g",    ".3g",     "G",
      "E",      "F",       "%",   ".1%", "06.2f", "+.1f", " .1f", "8",       "<8",
      "^9.1f",  "*>10.2f", "=+8", "02d", "d",     "03d",  "x",    "#x",      "X",
      "b",      "#b",      "o",   ",",   "_",     ",.2f", "012,", "012,.1f", "_x",
      "#o",     ".2",      ".5",  ".17", "#.0f",  "#.3g", "z.1f", "-5d",     "\u00e9>6d",
      "010.3e", "+",       ".2d", "q",   ",x",    "1.",   "s",    "<08.1f"};
  std::string ours;
  std::vector<std::string> arguments(specs.begin(), specs.end());
  arguments.emplace_back("--");
  const auto add = [&](const Number& value) {
    for (const auto& spec : specs) {
      try {
        ours += python_format(value, spec) + "\n";
      } catch (const MisconfigurationError&) {
        ours += "refused\n";
      }
    }
  };
  for (const double value : floats) {
    add(value);
    arguments.push_back("f" + python_repr(value));
  }
  for (const int64_t value : ints) {
    add(value);
    arguments.push_back("i" + std::to_string(value));
  }
  const std::string theirs = testing::run_python(R"(
import sys
split = sys.argv.index("--")
specs, values = sys.argv[1:split], sys.argv[split + 1:]
for text in values:
    value = float(text[1:]) if text[0] == "f" else int(text[1:])
    for spec in specs:
        try:
            print(format(value, spec))
        except ValueError:
            print("refused")
)",
                                                 arguments);
  std::istringstream a(ours), b(theirs);
  std::string mine, python;
  for (size_t i = 0; std::getline(b, python); ++i) {
    REQUIRE(std::getline(a, mine));
    CAPTURE(specs[i % specs.size()], arguments[specs.size() + 1 + i / specs.size()]);
    CHECK(mine == python);
  }
}

TEST_CASE("a specification that makes no sense is refused with an example", "[format]") {
  CHECK_THROWS_WITH(python_format(1.5, "d"), Contains("Format \"d\"") &&
                                                 Contains("a float does not take") &&
                                                 Contains("\".2f\""));
  CHECK_THROWS_WITH(python_format_fields("{0[loss", {}), Contains("File name \"{0[loss\""));
  CHECK_THROWS_WITH(python_format_fields("a}b", {}), Contains("single \"}\""));
  CHECK(python_format_fields("{{{0[a]:02d}}}", {{"a", int64_t{3}}}) == "{03}");
}
