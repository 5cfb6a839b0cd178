// When rank 0 asks the others what they do, and what it makes of the answers.
#include "lightning/distributed/lookout.h"

#include <signal.h>

#include <catch2/catch.hpp>
#include <chrono>
#include <thread>

using namespace lightning;
using Catch::Contains;
using std::chrono::seconds;

namespace {

const Lookout::Time kStart{};

Doings one_waits_alone() {
  return {{0, {"save", "barrier", seconds(12)}}, {1, {"backward", "gradients", seconds(11)}}};
}

}  // namespace

TEST_CASE("ranks are asked once a second from the first signal to the last rank's all-clear",
          "[distributed]") {
  Lookout lookout;
  CHECK(!lookout.next());
  lookout.on_signal(1, SIGTERM, kStart);
  lookout.on_signal(0, SIGTERM, kStart + seconds(1));  // the first one counts
  CHECK(lookout.next() == kStart + seconds(1));
  CHECK(!lookout.due(kStart));
  CHECK(lookout.due(kStart + seconds(1)));
  CHECK(!lookout.due(kStart + seconds(1)));
  CHECK(lookout.due(kStart + seconds(2)));
  lookout.on_signal(1, 0, kStart);
  CHECK(lookout.next());
  lookout.on_signal(0, 0, kStart);
  CHECK(!lookout.next());
}

TEST_CASE("a question is open until all ranks have answered it", "[distributed]") {
  Lookout lookout;
  CHECK(lookout.begin());
  CHECK(!lookout.on_answer(0, {"save", "", seconds(0)}, 2));
  CHECK(!lookout.begin());
  const auto all = lookout.on_answer(1, {"", "", seconds(0)}, 2);
  REQUIRE(all);
  CHECK(all->at(0).call == "save");
  CHECK(lookout.begin());
  CHECK(!lookout.on_answer(1, {"", "", seconds(0)}, 2));  // none is left of the answers before
}

TEST_CASE("a rank that waits in vain is found after a signal, which is named", "[distributed]") {
  Lookout lookout;
  CHECK(!lookout.find_stuck(one_waits_alone(), kStart + seconds(99)));
  lookout.on_signal(1, SIGINT, kStart);
  CHECK(!lookout.find_stuck(one_waits_alone(), kStart + seconds(3)));
  const auto stuck = lookout.find_stuck(one_waits_alone(), kStart + seconds(9));
  REQUIRE(stuck);
  CHECK(stuck->rank == 0);
  CHECK(stuck->signal == SIGINT);
  CHECK_THAT(stuck->text, Contains("has waited in `save` (barrier) for 12 s") &&
                              Contains("asked to end by SIGINT"));
}

TEST_CASE("what ranks do goes through a message unchanged", "[distributed]") {
  const auto message = message_of(one_waits_alone());
  MessageReader reader(message);
  const auto read = read_doings(reader);
  REQUIRE(read.size() == 2);
  CHECK(read.at(1).call == "backward");
  CHECK(read.at(1).waits_for == "gradients");
  CHECK(read.at(1).waited == seconds(11));
}

TEST_CASE("who asks what the others do hears it from another thread", "[distributed]") {
  ToldDoings told;
  std::thread rank_0;
  const auto others =
      told.ask_of_others(1, [&] { rank_0 = std::thread([&] { told.hear(one_waits_alone()); }); });
  rank_0.join();
  CHECK(others == "rank 0 has waited in `save` (barrier) for 12 s");
  CHECK(told.ask_of_others(1, [] {}).empty());
}
