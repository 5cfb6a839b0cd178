#include "lightning/yaml.h"

#include <catch2/catch.hpp>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>

#include "lightning/files.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

using Catch::Contains;
using lightning::from_yaml;
using lightning::Json;
using lightning::MisconfigurationError;
using lightning::to_yaml;
using lightning::testing::run_python;
using lightning::testing::TempDir;

namespace {

// Texts that some YAML reader takes for something else, or that need breaking or escaping.
const std::vector<std::string> kTexts = {
    "",
    " ",
    "a",
    "plain text",
    "yes",
    "No",
    "ON",
    "off",
    "true",
    "y",
    "n",
    "null",
    "Null",
    "~",
    "1",
    "-1",
    "+1",
    "0",
    "007",
    "0o7",
    "0x1F",
    "0b11",
    "1_000",
    "1:30",
    "12:30:45",
    "1.5",
    "1.",
    ".5",
    "-.5",
    "1e5",
    "1e-05",
    "1.0e-05",
    "1.0e5",
    "1.e+3",
    "1:30.5",
    "inf",
    ".Inf",
    "nan",
    ".NaN",
    "2024-01-02",
    "2024-1-2",
    "2024-01-02 03:04:05",
    "2024-01-02T03:04:05.5Z",
    "2001-12-14 21:59:43.10 -5",
    "<<",
    "=",
    "-",
    "- a",
    "-a",
    "?",
    "? a",
    "?a",
    ":",
    ": a",
    ":a",
    "a:",
    "a: b",
    "a:b",
    "a #b",
    "a#b",
    "#a",
    "---",
    "--- a",
    "...",
    "[1]",
    "{a}",
    "a, b",
    "a[0]",
    "&a",
    "*a",
    "!a",
    "|",
    ">",
    "%a",
    "@a",
    "`a",
    "'a'",
    "\"a\"",
    "it's",
    "a\\b",
    "a\tb",
    "a\nb",
    "a\n",
    "\na",
    "a\n\nb",
    "a \nb",
    "a\n b",
    "a\r\nb",
    "\x01\x7f",
    "\xC3\xA9t\xC3\xA9",
    "\xE2\x80\xA8",
    "\xF0\x9F\x98\x80",
    "\xC2\x85",
    "\xEF\xBB\xBF",
    std::string("a\0b", 3),
    " a",
    "a ",
    "a  b",
    "a rather long sentence that goes on and on so that it does not fit on one line of eighty, and "
    "on",
    "a rather long sentence: that goes on and on so that it does not fit on one line of eighty, "
    "it's on",
    "a rather long sentence, \xC3\xA9t\xC3\xA9, that goes on and on so that  it does not fit on "
    "one line of it",
    "nospaces_nospaces_nospaces_nospaces_nospaces_nospaces_nospaces_nospaces_nospaces_nospaces_x y "
    "z",
    std::string(200, 'x'),
    std::string(50, 'x') + "\t" + std::string(60, 'y') + " \t " + std::string(90, 'z')};

Json random_value(std::mt19937& random, int depth) {
  const auto pick = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  const int kind = pick(depth > 0 ? 8 : 6);
  if (kind == 0) return nullptr;
  if (kind == 1) return pick(2) == 0;
  if (kind == 2) return static_cast<int64_t>(random()) - (int64_t{1} << 31);
  if (kind == 3) return std::ldexp(static_cast<double>(random()), pick(120) - 90);
  if (kind <= 5) {
    std::string text = kTexts[static_cast<size_t>(pick(static_cast<int>(kTexts.size())))];
    for (int more = pick(6); more > 2; --more) {
      text += (pick(2) == 0 ? " " : "") +
              kTexts[static_cast<size_t>(pick(static_cast<int>(kTexts.size())))];
    }
    return text;
  }
  Json out = kind == 6 ? Json::array() : Json::object();
  for (int i = pick(4); i > 0; --i) {
    if (kind == 6) {
      out.push_back(random_value(random, depth - 1));
    } else {
      out[random_value(random, 0).dump().substr(0, static_cast<size_t>(1 + pick(150)))] =
          random_value(random, depth - 1);
    }
  }
  return out;
}

// A list of cases on disk, each also in YAML as we write it.
void write_cases(const Json& cases, const TempDir& dir) {
  std::ofstream(dir.path("cases.json"))
      << cases.dump(-1, ' ', true, Json::error_handler_t::replace);
  Json written = Json::array();
  for (const auto& value : cases) written.push_back(to_yaml(value));
  std::ofstream(dir.path("yaml.json")) << written.dump(-1, ' ', true);
}

constexpr const char* kCompareDumps = R"(
import json, sys, yaml
cases, written = json.load(open(sys.argv[1])), json.load(open(sys.argv[2]))
for value, text in zip(cases, written):
    assert text == yaml.dump(value), f'{value!r}\nours:\n{text}\nPyYAML:\n{yaml.dump(value)}'
    assert yaml.safe_load(text) == value, f'{value!r} reads back as {yaml.safe_load(text)!r}'
print(len(cases), 'equal')
)";

}  // namespace

TEST_CASE("YAML is what PyYAML writes, byte for byte", "[yaml]") {
  TempDir dir;
  std::mt19937 random(1);
  Json cases = Json::array();
  for (const auto& text : kTexts) {
    cases.push_back(Json{{"key", text}, {"list", {text, {text}}}});
    if (!text.empty()) cases.push_back(Json{{text, {{text, 1}}}});
    cases.push_back(text);
  }
  for (const double number :
       {0.0, -0.0, 1.0, 0.1, 1e-5, 1.5e-5, 1e-4, 1e15, 1e16, 1e17, 1.5e300, 1 / 3.0}) {
    cases.push_back(Json{{"x", number}});
  }
  cases.push_back(Json::object());
  cases.push_back(Json{{"a", Json::array()}, {"b", Json::object()}, {"c", {{1, 2}, {{3}}}}});
  cases.push_back(Json{{"layers", {{{"width", 3}, {"sizes", {1, 2}}}, {{"width", 4}}}}});
  for (int i = 0; i < 2000; ++i) cases.push_back(random_value(random, 4));
  write_cases(cases, dir);
  CHECK_THAT(run_python(kCompareDumps, {dir.path("cases.json"), dir.path("yaml.json")}),
             Contains("equal"));

  for (const auto& value : cases) {
    INFO(to_yaml(value));
    CHECK(from_yaml(to_yaml(value, false), "test") == value);
  }
}

TEST_CASE("infinity and nan travel through YAML as the words it has for them", "[yaml]") {
  CHECK(to_yaml(Json{{"a", ".inf"}, {"b", "-.inf"}, {"c", ".nan"}, {"d", "inf"}}) ==
        "a: .inf\nb: -.inf\nc: .nan\nd: inf\n");
  CHECK(to_yaml(Json{{"a", INFINITY}, {"b", -INFINITY}, {"c", NAN}}) ==
        "a: .inf\nb: -.inf\nc: .nan\n");
  CHECK(from_yaml("[.inf, -.INF, .NaN]", "test") == Json({".inf", "-.inf", ".nan"}));
}

TEST_CASE("a scalar means what it means to PyYAML", "[yaml]") {
  TempDir dir;
  std::string text;
  for (const char* scalar : {"yes",
                             "No",
                             "on",
                             "OFF",
                             "y",
                             "True",
                             "null",
                             "~",
                             "",
                             "1",
                             "-1",
                             "+12",
                             "0",
                             "007",
                             "-0x1F",
                             "0b101",
                             "1_000",
                             "1:30",
                             "-1:30:15",
                             "1.5",
                             "1.",
                             "-1.25e+3",
                             "1e5",
                             "1e-05",
                             "1.0e-05",
                             ".5",
                             "-.5",
                             "1_0.5",
                             "1:30.5",
                             "0o7",
                             "08",
                             "18446744073709551615",
                             "-9223372036854775808",
                             "'1'",
                             "\"yes\"",
                             "!!str 1",
                             "!!float 1",
                             "!!int 7",
                             "some text",
                             "a:b",
                             "inf"}) {
    text += std::string("- ") + scalar + "\n";
  }
  text += "- &base {a: 1, b: 2}\n- {<<: *base, b: 3}\n- {<<: [{a: 1}, {a: 2, c: 3}]}\n- *base\n";
  lightning::write_file(dir.path("scalars.yaml"), text);

  const auto theirs =
      run_python("import json, sys, yaml; print(json.dumps(yaml.safe_load(open(sys.argv[1]))))",
                 {dir.path("scalars.yaml")});
  const Json ours = from_yaml(text, "test");
  const Json expected = Json::parse(theirs);
  REQUIRE(ours.size() == expected.size());
  for (size_t i = 0; i < ours.size(); ++i) {
    INFO(i << ": " << ours[i] << " " << expected[i]);
    // Maps compare without their order.
    CHECK(nlohmann::json::parse(ours[i].dump()) == nlohmann::json::parse(expected[i].dump()));
    CHECK(ours[i].is_number_float() == expected[i].is_number_float());
  }
}

TEST_CASE("bad YAML is refused with its line, and objects are never made", "[yaml]") {
  CHECK_THROWS_WITH(from_yaml("a: 1\nb: [1, 2\n", "run.yaml"),
                    Contains("run.yaml:3:1") && Contains("not valid YAML"));
  CHECK_THROWS_WITH(from_yaml("a: 1\nb: !!python/object/apply:os.system [ls]\n", "run.yaml"),
                    Contains("run.yaml:2") && Contains("python/object/apply:os.system"));
  CHECK_THROWS_AS(from_yaml("a: &x [*x]", "run.yaml"), MisconfigurationError);
  CHECK(from_yaml("a: !!python/tuple\n- 1\n- 2\n", "run.yaml") == Json{{"a", {1, 2}}});
}
