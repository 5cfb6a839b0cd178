// The program as it is built: what its process prints and how it ends.
#include <sys/wait.h>
#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <cstdlib>

#include "lightning/checkpoint/safetensors.h"
#include "lightning/files.h"
#include "tests/support/temp_dir.h"

using Catch::Matchers::Contains;
using namespace lightning;
using lightning::testing::TempDir;

namespace {

int status_of(const std::string& arguments) {
  const int status = std::system(("tools/lightning/lightning " + arguments).c_str());
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

}  // namespace

TEST_CASE("the program prints to stdout, its errors to stderr, and ends with its status",
          "[tools]") {
  TempDir dir;
  write_safetensors(dir.path("w.safetensors"), {{{"w", torch::ones(3)}}, {}});
  const auto here = [&](const std::string& arguments) {
    return "checkpoint " + arguments + " > " + dir.path("out") + " 2> " + dir.path("err");
  };
  CHECK(status_of(here("show " + dir.path("w.safetensors"))) == 0);
  CHECK_THAT(read_file(dir.path("out")), Contains("Tensor float32 [3]"));
  CHECK(read_file(dir.path("err")).empty());
  CHECK(status_of(here("convert " + dir.path("w.safetensors") + " " + dir.path("w.pt"))) == 0);
  CHECK(status_of(here("verify " + dir.path("w.pt") + " " + dir.path("w.safetensors"))) == 0);
  CHECK(status_of(here("show " + dir.path("absent"))) == 1);
  CHECK(read_file(dir.path("out")).empty());
  CHECK_THAT(read_file(dir.path("err")), Contains("error: ") && Contains("absent"));
  CHECK(status_of(here("verify " + dir.path("absent"))) == 2);
  CHECK(status_of(here("--nonsense")) == 2);
  // What cannot be printed was not shown.
  CHECK(status_of("checkpoint show " + dir.path("w.safetensors") + " > /dev/full") == 1);
}
