// When a rank counts as one that waits in vain.
#include "lightning/distributed/whereabouts.h"

#include <catch2/catch.hpp>
#include <chrono>

using namespace lightning;
using Catch::Contains;
using std::chrono::seconds;

namespace {

Whereabouts waiting(const char* call, int for_seconds) {
  return {call, "barrier", seconds(for_seconds)};
}
Whereabouts working(const char* call = "") { return {call, "", seconds(0)}; }

}  // namespace

TEST_CASE("the outermost call counts, and a wait outside of calls names one", "[distributed]") {
  CHECK(whereabouts().call.empty());
  {
    const Scope outer = in_call("Trainer.save_checkpoint"), inner = in_call("reduce");
    CHECK(whereabouts().call == "Trainer.save_checkpoint");
    CHECK(!whereabouts().waits());
    const Scope waits = waiting_for("barrier");
    CHECK(whereabouts().waits());
    CHECK_THAT(describe(whereabouts()),
               Contains("has waited in `Trainer.save_checkpoint` (barrier) for 0 s"));
  }
  const Scope waits = waiting_for("reduce");
  CHECK(whereabouts().call == "reduce");
}

TEST_CASE("a rank is stuck where all that it waits for wait for something else", "[distributed]") {
  const auto stuck =
      find_stuck({{0, waiting("save", 12)}, {1, waiting("backward", 11)}}, seconds(9));
  REQUIRE(stuck);
  CHECK(stuck->rank == 0);
  CHECK_THAT(stuck->text, Contains("has waited in `save` (barrier) for 12 s") &&
                              Contains("rank 1 is not in it: it has waited in `backward`"));
}

TEST_CASE("a rank is not stuck while what it waits for may come", "[distributed]") {
  // Not long enough, or not since the signal.
  CHECK(!find_stuck({{0, waiting("save", 3)}, {1, waiting("backward", 11)}}, seconds(9)));
  CHECK(!find_stuck({{0, waiting("save", 12)}, {1, waiting("backward", 11)}}, seconds(3)));
  // All are in it.
  CHECK(!find_stuck({{0, waiting("save", 99)}, {1, waiting("save", 99)}}, seconds(99)));
  // One works in the call, as rank 0 while it writes the file.
  CHECK(!find_stuck({{0, working("save")}, {1, waiting("save", 99)}, {2, working()}}, seconds(99)));
  // The other may be late.
  CHECK(!find_stuck({{0, waiting("save", 12)}, {1, working()}}, seconds(12)));
  // But not for ever.
  CHECK(find_stuck({{0, waiting("save", 25)}, {1, working()}}, seconds(25)));
}
