#include "lightning/results_table.h"

#include <catch2/catch.hpp>
#include <sstream>

#include "lightning/python_text.h"
#include "tests/support/python.h"

using namespace lightning;

namespace {

using Results = std::vector<std::map<std::string, double>>;

// Prints the original's table of the results in sys.argv[1] for a terminal of sys.argv[2] columns.
constexpr const char* kTable = R"(
import ast, os, sys, torch
os.environ['COLUMNS'] = sys.argv[2]
import lightning.pytorch.loops.evaluation_loop as loop
loop._RICH_AVAILABLE = False
sys.stdout.reconfigure(encoding='utf-8')
loop._EvaluationLoop._print_results(ast.literal_eval(sys.argv[1]), sys.argv[3])
)";

std::string literal(const Results& results) {
  std::ostringstream out;
  out << "[";
  for (const auto& metrics : results) {
    out << "{";
    for (const auto& [name, value] : metrics)
      out << "'" << name << "': " << python_repr(value) << ", ";
    out << "}, ";
  }
  out << "]";
  return out.str();
}

}  // namespace

TEST_CASE("the table of results is the original's", "[python]") {
  const Results one = {{{"test_loss", 0.123456789}, {"test_accuracy", 0.91}}};
  const Results two = {{{"loss/dataloader_idx_0", 0.5}, {"a/dataloader_idx_0", 1e-7}},
                       {{"loss/dataloader_idx_1", 0.25}}};
  const std::string prefix(70, 'm');
  const Results long_name = {{{prefix + "_end", 2.0}, {"b", 0.1}}, {{"b", 3.0}}};
  const Results many(9, {{"val_loss", 0.75}});
  for (const auto& results : {one, two, long_name, many}) {
    for (const char* width : {"120", "80", "53"}) {
      const std::string expected =
          testing::run_python(kTable, {literal(results), width, "validate"});
      CHECK(format_results_table(results, "validate", std::stoi(width)) == expected);
    }
  }
}

TEST_CASE("nothing logged gives no table of results") {
  CHECK(format_results_table({}, "test", 80).empty());
  CHECK(format_results_table({{}, {}}, "test", 80).empty());
}

TEST_CASE("an unknown width stands for 120 columns") {
  const Results results = {{{"test_loss", 0.5}}};
  CHECK(format_results_table(results, "test", 0) == format_results_table(results, "test", 120));
  CHECK(format_results_table(results, "test", 80).find("Test metric") != std::string::npos);
}
