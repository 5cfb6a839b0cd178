// The toolchain holds: LibTorch computes, and Debian's libraries link beside it.
#include <ATen/Parallel.h>
#include <torch/types.h>
#include <yaml-cpp/yaml.h>

#include <CLI/CLI.hpp>
#include <catch2/catch.hpp>
#include <cstdlib>
#include <nlohmann/json.hpp>

TEST_CASE("LibTorch computes on the CPU with one thread", "[toolchain]") {
  const auto sum = torch::ones({2, 3}).sum().item<float>();

  CHECK(sum == 6.0f);
  CHECK(at::get_num_threads() == 1);
}

TEST_CASE("YAML, JSON and the command line are read", "[toolchain]") {
  CHECK(YAML::Load("{epochs: 3}")["epochs"].as<int>() == 3);
  CHECK(nlohmann::json::parse("[1, 2]").size() == 2);

  CLI::App app;
  int epochs = 0;
  app.add_option("--epochs", epochs);
  app.parse("--epochs 4");
  CHECK(epochs == 4);
}

TEST_CASE("a test knows the Python interpreter that has torch", "[toolchain]") {
  REQUIRE(std::getenv("LIGHTNING_PYTHON") != nullptr);
  const std::string python = std::getenv("LIGHTNING_PYTHON");

  CHECK(std::system(
            (python + " -c 'import importlib.util as u; assert u.find_spec(\"torch\")'").c_str()) ==
        0);
}
