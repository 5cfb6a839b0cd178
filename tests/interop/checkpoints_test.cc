// Trainer checkpoints between Python Lightning and this framework, over the runs of cases.json:
// both train three epochs from the same weights; each goes on with the other's second epoch.
// interop.py compares the files as Python reads them.
#include <torch/utils.h>

#include <catch2/catch.hpp>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "tests/interop/runs.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

namespace lightning::testing {
namespace {

constexpr const char* kCases = "tests/interop/cases.json";

std::string run_interop(const std::string& command, const std::string& folder) {
  return run_python(
      "import runpy, sys; sys.argv = sys.argv[1:]; "
      "runpy.run_path(sys.argv[0], run_name='__main__')",
      {"tests/interop/interop.py", command, kCases, folder});
}

// Every run once, and what the other side says of it.
class Report {
 public:
  Report() {
    torch::set_num_threads(1);
    std::ifstream in(kCases);
    cases_ = Json::parse(in);
    run_interop("write", dir_.path());
    for (const auto& [name, run] : cases_.items()) train(name, run);
    report_ = Json::parse(run_interop("check", dir_.path()));
  }

  std::vector<std::string> names() const {
    std::vector<std::string> names;
    for (const auto& item : cases_.items()) names.push_back(item.key());
    return names;
  }
  std::string lines(const std::string& name, const std::string& kind) const {
    std::string text;
    for (const Json& line : report_[name][kind]) text += line.get<std::string>() + "\n";
    return text;
  }
  const std::string& error(const std::string& name) { return errors_[name]; }
  const Fitted& resumed(const std::string& name) { return resumed_[name]; }
  const Json& run(const std::string& name) const { return cases_[name]; }

 private:
  void train(const std::string& name, const Json& run) {
    try {
      fit(run, dir_.path("cpp/" + name));
      if (run.value("weights_only", false)) return;
      resumed_[name] =
          fit(run, dir_.path("cpp_resumed/" + name), saved(dir_.path("py/" + name), 1));
    } catch (const std::exception& error) {
      errors_[name] = error.what();
    }
  }

  TempDir dir_;
  Json cases_, report_;
  std::map<std::string, std::string> errors_;
  std::map<std::string, Fitted> resumed_;
};

Report& report() {
  static Report instance;
  return instance;
}

TEST_CASE("a checkpoint has the keys, order and types of Python's for the same run", "[interop]") {
  for (const auto& name : report().names()) {
    INFO(name);
    CHECK(report().error(name) == "");
    CHECK(report().lines(name, "structure") == "");
  }
}

TEST_CASE("the same run gives the same bits as Python's, in every value of its checkpoints",
          "[interop]") {
  for (const auto& name : report().names()) {
    INFO(name);
    CHECK(report().lines(name, "values") == "");
  }
}

TEST_CASE("a run of Python's goes on here, bit for bit", "[interop]") {
  for (const auto& name : report().names()) {
    INFO(name);
    CHECK(report().lines(name, "resumed by C++") == "");
  }
}

TEST_CASE("a run of ours goes on in Python, bit for bit", "[interop]") {
  for (const auto& name : report().names()) {
    INFO(name);
    CHECK(report().lines(name, "resumed by Python") == "");
  }
}

TEST_CASE("Python takes our checkpoints whole, mapped, on meta, for validate and to build a module",
          "[interop]") {
  for (const auto& name : report().names()) {
    INFO(name);
    CHECK(report().lines(name, "taken by Python") == "");
  }
}

TEST_CASE("the hooks of module and data module see what Python's hooks saved", "[interop]") {
  for (const auto& name : report().names()) {
    if (report().run(name).value("weights_only", false)) continue;
    INFO(name);
    const Fitted& fitted = report().resumed(name);
    REQUIRE(fitted.module != nullptr);
    CHECK(fitted.module->seen.at("note").as_string() == "Grüße");
    CHECK(fitted.module->seen.at("big").as_int() == int64_t{1} << 40);
    if (fitted.data == nullptr) continue;
    CHECK(fitted.data->loaded.at("token").as_string() == "seven");
    CHECK(fitted.data->loaded.at("position").at("offsets").as_list().size() == 3);
  }
}

}  // namespace
}  // namespace lightning::testing
