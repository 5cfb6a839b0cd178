// main() of every test program: Catch2's, and what makes it at home under Bazel.
//
// --test_filter=SPEC picks test cases in Catch2's own language, and the test cases' names and
// results go to the XML file that Bazel asks for, which tools/test_summary.py counts.
#define CATCH_CONFIG_RUNNER
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cstdlib>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

namespace {

// Takes a variable out of the environment, so that processes which a test starts do not act on it.
std::string take_env(const char* name) {
  const char* value = std::getenv(name);
  std::string taken = value == nullptr ? "" : value;
  unsetenv(name);
  return taken;
}

std::string xml_path;

std::string escaped(const std::string& text) {
  std::string out;
  for (char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
    }
  }
  return out;
}

// Writes one <testcase> for each test case, after each, so that a program which dies leaves behind
// what it got through; the one that was running is then listed as failed.
class XmlListener : public Catch::TestEventListenerBase {
 public:
  using TestEventListenerBase::TestEventListenerBase;

  void testCaseStarting(const Catch::TestCaseInfo& info) override {
    cases_.push_back({info.name, false, 0.0});
    timer_.start();
    write();
  }

  void testCaseEnded(const Catch::TestCaseStats& stats) override {
    cases_.back().passed = stats.totals.testCases.failed == 0;
    cases_.back().seconds = timer_.getElapsedSeconds();
    write();
  }

 private:
  struct Case {
    std::string name;
    bool passed;
    double seconds;
  };

  void write() const {
    if (xml_path.empty() || getpid() != owner_) {
      return;
    }
    std::ofstream xml(xml_path, std::ios::trunc);
    xml << "<testsuites><testsuite name=\"catch2\">\n";
    for (const auto& test : cases_) {
      xml << "<testcase name=\"" << escaped(test.name) << "\" time=\"" << test.seconds << "\">"
          << (test.passed ? "" : "<failure/>") << "</testcase>\n";
    }
    xml << "</testsuite></testsuites>\n";
  }

  std::vector<Case> cases_;
  Catch::Timer timer_;
  pid_t owner_ = getpid();  // a forked child must not write over its parent's results
};

CATCH_REGISTER_LISTENER(XmlListener)

}  // namespace

int main(int argc, char** argv) {
  xml_path = take_env("XML_OUTPUT_FILE");
  const std::string filter = take_env("TESTBRIDGE_TEST_ONLY");

  Catch::Session session;
  if (int error = session.applyCommandLine(argc, argv)) {
    return error;
  }
  if (!filter.empty()) {
    session.configData().testsOrTags.push_back(filter);
  }
  const int failed = session.run();
  return failed == 0 ? 0 : 1;
}
