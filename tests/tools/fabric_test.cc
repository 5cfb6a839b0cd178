#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <filesystem>
#include <sstream>

#include "lightning/checkpoint/dcp.h"
#include "lightning/checkpoint/torch_file.h"
#include "tests/support/temp_dir.h"
#include "tools/fabric/command_line.h"

using Catch::Matchers::Contains;
using namespace lightning;
using lightning::testing::TempDir;

namespace {

struct Result {
  int status;
  std::string out, err;
};

Result fabric(const std::vector<std::string>& arguments) {
  std::ostringstream out, err;
  const int status = tools::run_fabric(arguments, out, err);
  return {status, out.str(), err.str()};
}

}  // namespace

TEST_CASE("fabric consolidate writes one file beside the folder, or where it is told", "[tools]") {
  const TempDir dir;
  const auto folder = dir.path("step=3.ckpt");
  const auto model = State::dict({{"weight", torch::ones({2, 3})}});
  write_dcp(State::dict({{"model", model}}), folder);

  auto result = fabric({"consolidate", folder + "/"});
  CHECK(result.status == 0);
  CHECK(result.err.empty());
  CHECK(result.out == folder + ".consolidated\n");
  const auto ones = [](const State& weights) {
    return at::equal(weights.at("weight").as_tensor(), torch::ones({2, 3}));
  };
  CHECK(ones(read_torch_file(folder + ".consolidated").at("model")));

  result = fabric({"consolidate", folder});
  CHECK(result.status == 1);
  CHECK_THAT(result.err, Contains("error: ") && Contains(".consolidated exists."));
  CHECK(fabric({"consolidate", folder, "--overwrite"}).status == 0);

  const auto file = dir.path("one.ckpt");
  CHECK(fabric({"consolidate", folder, "--output_file", file, "--trainer"}).status == 0);
  CHECK(ones(read_torch_file(file).at("state_dict")));
}

TEST_CASE("fabric says what it cannot do", "[tools]") {
  const TempDir dir;
  auto result = fabric({"consolidate", dir.path("absent")});
  CHECK(result.status == 1);
  CHECK_THAT(result.err, Contains("absent") && Contains("No such file or directory"));
  CHECK(fabric({"consolidate"}).status == 2);
  result = fabric({"consolidat", dir.path("absent")});
  CHECK(result.status == 2);
  CHECK_THAT(result.err, Contains("Did you mean \"consolidate\"?"));
  CHECK(fabric({"--help"}).status == 0);
}
