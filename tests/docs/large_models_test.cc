// docs/large-models.md is true: its commands are run as they are written, one after the other, in a
// folder laid out as a checkout that was built. In the text a `sh` block is run; a `text` block
// says what the last one printed, "..." standing for anything; a `cpp` block is code of the
// example.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

#include "lightning/files.h"
#include "tests/support/temp_dir.h"

using lightning::read_file;
using lightning::testing::TempDir;

namespace {

constexpr const char* kEndOfBlock = "@@ end of block ";

struct Block {
  std::string language, text;
};

std::vector<Block> blocks_of(const std::string& markdown) {
  const std::string fence = "```";
  std::vector<Block> blocks;
  std::istringstream lines(markdown);
  bool inside = false;
  for (std::string line; std::getline(lines, line);) {
    if (line.compare(0, fence.size(), fence) == 0) {
      inside = !inside;
      if (inside) blocks.push_back({line.substr(fence.size()), ""});
    } else if (inside) {
      blocks.back().text += line + "\n";
    }
  }
  return blocks;
}

std::vector<Block> guide() { return blocks_of(read_file("docs/large-models.md")); }

// The parts of a text between line ends and "...".
std::vector<std::string> pieces(const std::string& text) {
  std::vector<std::string> found;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    for (size_t begin = 0; begin < line.size();) {
      const auto dots = std::min(line.find(" ... ", begin), line.size());
      found.push_back(line.substr(begin, dots - begin));
      begin = dots + 5;
    }
  }
  return found;
}

// A checkout in the current folder: what is in the runfiles, under the names that Bazel and
// tools/setup.sh give it. `bazel build` has been done.
std::string checkout() {
  return R"sh(
mkdir -p bazel-bin/examples bazel-bin/tools
ln -s "$RUNFILES/examples/gpt2" bazel-bin/examples/gpt2
ln -s "$RUNFILES/tools/lightning" bazel-bin/tools/lightning
ln -s "$RUNFILES/examples" examples
ln -s "$(dirname "$(dirname "${LIGHTNING_PYTHON:-$RUNFILES/.venv/bin/python}")")" .venv
bazel() { :; }
)sh";
}

// Each `sh` block, and the status of the last command of it that failed.
std::string script_of(const std::vector<Block>& blocks) {
  std::ostringstream script;
  script << "export RUNFILES=$PWD; cd \"$1\" || exit 1\n"
         << checkout() << "failed=0\n"
         << "trap 'failed=$?' ERR\n";
  for (const auto& block : blocks) {
    if (block.language != "sh") continue;
    script << "failed=0\n" << block.text << "echo \"" << kEndOfBlock << "$failed\"\n";
  }
  return script.str();
}

struct Ended {
  std::string output;
  int status = -1;
};

std::vector<Ended> run(const std::vector<Block>& blocks) {
  TempDir dir;
  const auto script = dir.path("script"), output = dir.path("output");
  lightning::write_file(script, script_of(blocks));
  const auto command =
      "timeout -k 5 800 bash " + script + " " + dir.path() + " > " + output + " 2>&1 < /dev/null";
  const int status = std::system(command.c_str());
  auto all = read_file(output);
  INFO(all);
  REQUIRE(status == 0);
  std::vector<Ended> ended;
  const std::string mark = kEndOfBlock;
  for (size_t begin = 0, end; (end = all.find(mark, begin)) != std::string::npos;) {
    const auto number = end + mark.size();
    ended.push_back({all.substr(begin, end - begin), std::atoi(&all[number])});
    begin = all.find('\n', number) + 1;
  }
  return ended;
}

}  // namespace

TEST_CASE("the commands of docs/large-models.md do what it says", "[docs]") {
  const auto blocks = guide();
  const auto ended = run(blocks);
  size_t runs = 0;
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (blocks[i].language != "sh") continue;
    REQUIRE(runs < ended.size());
    const auto& [output, status] = ended[runs++];
    INFO(blocks[i].text << output);
    const auto said = i + 1 < blocks.size() && blocks[i + 1].language == "text"
                          ? pieces(blocks[i + 1].text)
                          : std::vector<std::string>{};
    size_t place = 0;
    for (const auto& piece : said) {
      CAPTURE(piece);
      place = output.find(piece, place);
      REQUIRE(place != std::string::npos);
    }
    const bool is_error = output.find("error: ") != std::string::npos;
    CHECK((status != 0) == is_error);
    CHECK((!is_error || !said.empty()));  // an error that the guide tells of
  }
  CHECK(runs == ended.size());
  CHECK(runs > 10);
}

TEST_CASE("the code in docs/large-models.md is the example's", "[docs]") {
  const auto program = read_file("examples/gpt2/main.cc");
  int found = 0;
  for (const auto& block : guide()) {
    if (block.language != "cpp") continue;
    INFO(block.text);
    CHECK(program.find(block.text) != std::string::npos);
    ++found;
  }
  CHECK(found > 0);
}
