// Programs of several ranks for tests: this test program again, running one of its hidden test
// cases, which starts the other ranks as any program does.
//
//   TEST_CASE("program: trains on two ranks", "[.program]") { ... results().write(...) ... }
//
//   TEST_CASE("two ranks train as one", "[ranks]") {
//     Ranks ranks;
//     const auto ended = ranks.run("program: trains on two ranks");
//     CHECK(ended.status == 0);
//   }
#pragma once

#include <chrono>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "tests/support/temp_dir.h"

namespace lightning::testing {

using Variables = std::map<std::string, std::string>;

struct Ended {
  int status = 0;  // of the process that was started; 128 and the signal that ended it
  std::string output;
  int still_running = 0;  // processes of the run, two seconds after its end; they are ended then
};

class Ranks {
 public:
  // Runs a hidden test case until it ends. What hangs is ended at the deadline, with status -1.
  //   variables   added to the environment; an empty value takes one out
  //   launcher    words before the program's own, as mpirun's
  //   meanwhile   called again and again while it runs
  Ended run(const std::string& test_case, const Variables& variables = {},
            const std::vector<std::string>& launcher = {},
            const std::function<void()>& meanwhile = nullptr,
            std::chrono::seconds deadline = std::chrono::seconds(60));

  const TempDir& dir() const { return dir_; }

  // In a rank: the folder of the test that runs it, and a variable of it.
  static std::string folder();
  static std::string variable(const std::string& name);

  // "cpu", or what LIGHTNING_TEST_ACCELERATOR says: "gpu" on a machine with two runs over NCCL.
  static std::string accelerator();
  static bool on_cpu() { return accelerator() == "cpu"; }
  // How many ranks to try.
  static std::vector<int64_t> counts();

 private:
  TempDir dir_;
};

}  // namespace lightning::testing
