// Hyper-parameters of every kind in a checkpoint of Python's: paths, numpy, enums, namespaces.
#include <torch/utils.h>

#include <catch2/catch.hpp>

#include "lightning/load_from_checkpoint.h"
#include "lightning/log.h"
#include "tests/interop/runs.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

namespace lightning::testing {
namespace {

struct Odd {
  Odd() {
    torch::set_num_threads(1);
    expected =
        Json::parse(run_python("import runpy, sys; sys.argv = sys.argv[1:]; "
                               "runpy.run_path(sys.argv[0], run_name='__main__')",
                               {"tests/interop/odd_hparams.py", dir.path()}));
  }
  TempDir dir;
  Json expected;  // null also where any text will do
};

Odd& odd() {
  static Odd instance;
  return instance;
}

// Silent while it lives.
struct Silence {
  Silence() : before(set_log_sink([](const std::string&) {})) {}
  ~Silence() { set_log_sink(before); }
  LogSink before;
};

}  // namespace

TEST_CASE("a run with odd hyper-parameters goes on", "[interop]") {
  const Json run = {{"optimizers", Json::array({Json::array({"AdamW", {{"lr", 0.01}}})})}};
  const auto fitted = fit(run, odd().dir.path("resumed"), saved(odd().dir.path(), 1));
  CHECK(fitted.module->seen.at("note").as_string() == "Grüße");
  const Silence silence;
  const auto theirs = load_from_checkpoint<Net>(saved(odd().dir.path(), 2));
  for (const auto& item : theirs->named_parameters()) {
    INFO(item.key());
    CHECK(item.value().equal(fitted.module->named_parameters()[item.key()]));
  }
}

TEST_CASE("odd hyper-parameters become the plain values behind them", "[interop]") {
  Json hparams;
  load_from_checkpoint<Net>(saved(odd().dir.path(), 2), {}, [&](const Json& found) {
    hparams = found;
    return std::make_shared<Net>(NetOptions());
  });
  CHECK(hparams["hidden"] == 16);
  for (const auto& [name, value] : odd().expected.items()) {
    INFO(name << " is " << hparams.value(name, Json("not there")).dump());
    REQUIRE(hparams.contains(name));
    if (value.is_null() && name != "nothing_here") {
      CHECK(!hparams[name].is_null());
    } else {
      CHECK(hparams[name] == value);
    }
  }
}

TEST_CASE("a class takes of odd hyper-parameters those that it has", "[interop]") {
  const Silence silence;
  const auto module =
      load_from_checkpoint<Net>(saved(odd().dir.path(), 2), LoadOptions().hparam("name", "mine"));
  CHECK(module->hparams()["hidden"] == 16);
  CHECK(module->hparams()["name"] == "mine");
}

}  // namespace lightning::testing
