#include "lightning/distributed/side_channel.h"

#include <catch2/catch.hpp>
#include <future>
#include <thread>
#include <torch/csrc/distributed/c10d/HashStore.hpp>

using namespace lightning;

TEST_CASE("texts come together on rank 0 and go from it to all, on any thread", "[distributed]") {
  const auto store = c10::make_intrusive<c10d::HashStore>();
  constexpr int64_t kRanks = 3;
  const auto rank = [&](int64_t number) {
    SideChannel channel(store, number, kRanks);
    std::vector<std::string> got;
    for (const std::string save : {"first", "second"}) {
      if (number == 1) std::this_thread::sleep_for(std::chrono::milliseconds(20));
      const auto all = channel.gather(save, save + std::to_string(number));
      CHECK(all.empty() == (number != 0));
      if (number == 0) {
        CHECK(all == std::vector<std::string>{save + "0", save + "1", save + "2"});
      }
      got.push_back(channel.broadcast(save + "/end", number == 0 ? "of " + save : "not heard"));
    }
    return got;
  };
  std::vector<std::future<std::vector<std::string>>> all;
  for (int64_t number = 0; number < kRanks; ++number) {
    all.push_back(std::async(std::launch::async, rank, number));
  }
  for (auto& one : all) CHECK(one.get() == std::vector<std::string>{"of first", "of second"});
  CHECK(store->getNumKeys() == 0);  // nothing piles up
}

TEST_CASE("a process that is alone hears itself", "[distributed]") {
  SideChannel channel;
  CHECK(channel.gather("name", "text") == std::vector<std::string>{"text"});
  CHECK(channel.broadcast("name", "text") == "text");
}
