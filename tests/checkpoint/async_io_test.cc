#include "lightning/checkpoint/async_io.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/zeros.h>
#include <sys/wait.h>
#include <torch/cuda.h>
#include <unistd.h>

#include <atomic>
#include <catch2/catch.hpp>
#include <chrono>
#include <filesystem>
#include <future>
#include <nlohmann/json.hpp>
#include <thread>

#include "lightning/checkpoint/snapshot.h"
#include "lightning/checkpoint/torch_file.h"
#include "lightning/errors.h"
#include "lightning/log.h"
#include "lightning/trainer.h"
#include "tests/support/boring.h"
#include "tests/support/temp_dir.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;
namespace fs = std::filesystem;

namespace {

// Notes what it is asked for; waits with each save until it is let go.
struct SlowIO : CheckpointIO {
  void save(const State& checkpoint, const std::string& path) override {
    if (gate.valid()) gate.wait();
    if (fails) throw CheckpointError("no room for " + path);
    saved = checkpoint.at("w").as_tensor().clone();
    note("save " + path);
  }
  State load(const std::string& path) override {
    note("load " + path);
    return State::dict();
  }
  void remove(const std::string& path) override { note("remove " + path); }
  void link(const std::string& target, const std::string& place) override {
    note("link " + place + " to " + target);
  }
  void note(const std::string& line) {
    const std::lock_guard<std::mutex> lock(mutex);
    lines.push_back(line);
  }

  std::shared_future<void> gate;
  std::atomic<bool> fails{false};
  at::Tensor saved;
  std::mutex mutex;
  std::vector<std::string> lines;
};

State weights(double value) { return State::dict({{"w", at::full({4}, value)}}); }

}  // namespace

TEST_CASE("a snapshot shares what the state shares, and keeps its values", "[checkpoint]") {
  const auto base = at::arange(24, at::kFloat).view({4, 6});
  State state =
      State::dict({{"base", base},
                   {"row", base[2]},
                   {"turned", base.t()},
                   {"wide", at::ones({1}).expand({5, 3})},
                   {"empty", at::zeros({0, 3})},
                   {"scalar", at::full({}, 7.0)},
                   {"list", State::List{base[1], "text", State::Tuple{State::List{base[0]}}}}});
  state["parameter"] = [&] {
    TensorState parameter(at::ones({2}));
    parameter.is_parameter = true;
    return parameter;
  }();
  const auto expected_row = base[2].clone();

  Snapshot snapshot;
  const State copy = snapshot.take(state);
  snapshot.wait();
  base.fill_(-1);

  CHECK(at::equal(copy.at("row").as_tensor(), expected_row));
  CHECK(copy.at("row").as_tensor().storage().unsafeGetStorageImpl() ==
        copy.at("base").as_tensor().storage().unsafeGetStorageImpl());
  CHECK(copy.at("turned").as_tensor().strides() == base.t().strides());
  CHECK(copy.at("wide").as_tensor().sizes() == at::IntArrayRef({5, 3}));
  CHECK(copy.at("wide").as_tensor().stride(0) == 0);
  CHECK(copy.at("empty").as_tensor().sizes() == at::IntArrayRef({0, 3}));
  CHECK(copy.at("scalar").as_double() == 7.0);
  CHECK(copy.at("list").as_list()[1].as_string() == "text");
  CHECK(copy.at("list").as_list()[2].as_list()[0].as_tensor()[5].item<float>() == 5);
  CHECK(copy.at("parameter").as_tensor_state().is_parameter);
}

TEST_CASE("a snapshot copies the part of a storage that is in use, once, into the same memory",
          "[checkpoint]") {
  const auto large = at::zeros({1000, 1000});
  const State state = State::dict({{"few", large.narrow(0, 500, 2)}, {"one", large[501]}});
  Snapshot snapshot;
  const void* first = nullptr;
  {
    const State copy = snapshot.take(state);
    first = copy.at("few").as_tensor().data_ptr();
  }
  CHECK(snapshot.bytes() >= 2 * 4000);
  CHECK(snapshot.bytes() < 2 * 4000 + 64);
  large.fill_(3);
  const State again = snapshot.take(state);
  CHECK(again.at("few").as_tensor().data_ptr() == first);
  CHECK(again.at("one").as_tensor().sum().item<float>() == 3000);
}

TEST_CASE("a save in the background holds the state of its moment", "[checkpoint]") {
  auto slow = std::make_shared<SlowIO>();
  std::promise<void> go;
  slow->gate = go.get_future().share();
  AsyncCheckpointIO io(slow);
  const State state = weights(1);
  io.save(state, "/a");
  state.at("w").as_tensor().fill_(2);
  CHECK(slow->lines.empty());
  CHECK(io.will_exist("/a") == true);
  CHECK_FALSE(io.will_exist("/b"));
  go.set_value();
  io.teardown();
  CHECK(slow->saved.sum().item<float>() == 4);
  CHECK_FALSE(io.will_exist("/a"));
}

// Everything the optimizer does next would show in the file if the copy were late.
TEST_CASE("a save of a GPU's tensors goes on beside the steps that change them",
          "[checkpoint][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  TempDir dir;
  const auto on_gpu = at::TensorOptions().device(at::kCUDA);
  const auto large = at::rand({4096, 4096}, on_gpu);
  const auto small = at::rand({3, 5}, on_gpu);
  const auto host = at::rand({7});
  const auto expected_large = large.cpu(), expected_small = small.cpu(), on_host = host.clone();
  const State state = State::dict({{"large", large},
                                   {"row", large[17]},
                                   {"turned", small.t()},
                                   {"host", host},
                                   {"empty", at::zeros({0, 3}, on_gpu)}});
  AsyncCheckpointIO io;
  for (const auto* name : {"first.ckpt", "second.ckpt"}) {  // the second into memory that is there
    INFO(name);
    large.copy_(expected_large);
    small.copy_(expected_small);
    host.copy_(on_host);
    io.save(State::dict({{"state_dict", state}}), dir.path(name));
    for (int step = 0; step < 20; ++step) large.mul_(1.1), small.add_(1);
    host.zero_();
    const State loaded = io.load(dir.path(name)).at("state_dict");
    CHECK(at::equal(loaded.at("large").as_tensor(), expected_large));
    CHECK(at::equal(loaded.at("row").as_tensor(), expected_large[17]));
    CHECK(at::equal(loaded.at("turned").as_tensor(), expected_small.t()));
    CHECK(at::equal(loaded.at("host").as_tensor(), on_host));
    CHECK(loaded.at("empty").as_tensor().sizes() == at::IntArrayRef({0, 3}));
  }
  io.teardown();

  write_torch_file(state, dir.path("at_once.ckpt"));
  CHECK(at::equal(read_torch_file(dir.path("at_once.ckpt")).at("large").as_tensor(), large.cpu()));
}

TEST_CASE("links, removals and loads come after the save before them", "[checkpoint]") {
  auto slow = std::make_shared<SlowIO>();
  std::promise<void> go;
  slow->gate = go.get_future().share();
  AsyncCheckpointIO io(slow);
  io.remove("/earlier");
  io.save(weights(1), "/new");
  io.link("/new", "/last");
  io.remove("/old");
  CHECK(io.will_exist("/old") == false);
  CHECK(io.will_exist("/last") == true);
  auto loading = std::async(std::launch::async, [&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    go.set_value();
  });
  io.load("/new");
  CHECK(slow->lines == std::vector<std::string>{"remove /earlier", "save /new",
                                                "link /last to /new", "remove /old", "load /new"});
}

TEST_CASE("a second save waits for the first, and the wait is measured", "[checkpoint]") {
  auto slow = std::make_shared<SlowIO>();
  std::promise<void> go;
  slow->gate = go.get_future().share();
  AsyncCheckpointIO io(slow);
  io.save(weights(1), "/a");
  CHECK(io.last_stall_seconds() < 0.05);
  auto later = std::async(std::launch::async, [&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(80));
    go.set_value();
  });
  io.save(weights(2), "/b");
  CHECK(io.last_stall_seconds() >= 0.07);
  io.teardown();
  CHECK(slow->lines == std::vector<std::string>{"save /a", "save /b"});
  CHECK(slow->saved.sum().item<float>() == 8);
}

TEST_CASE("an error of the background is told once, and nothing is removed after it",
          "[checkpoint]") {
  auto slow = std::make_shared<SlowIO>();
  std::promise<void> go;
  slow->gate = go.get_future().share();
  slow->fails = true;
  AsyncCheckpointIO io(slow);
  io.save(weights(1), "/a");
  io.link("/a", "/last");
  io.remove("/before");
  go.set_value();
  CHECK_THROWS_WITH(io.teardown(), Contains("no room for /a"));
  CHECK_NOTHROW(io.check());
  CHECK_NOTHROW(io.teardown());
  CHECK(slow->lines.empty());
}

TEST_CASE("a save after one that failed is made, and tells of that", "[checkpoint]") {
  auto slow = std::make_shared<SlowIO>();
  std::promise<void> go;
  slow->gate = go.get_future().share();
  slow->fails = true;
  AsyncCheckpointIO io(slow);
  io.save(weights(1), "/a");
  go.set_value();
  while (io.will_exist("/a")) std::this_thread::yield();
  io.remove("/before");  // would be at once, but what /a was to replace stays
  slow->fails = false;
  CHECK_THROWS_WITH(io.save(weights(2), "/b"), Contains("no room for /a"));
  io.remove("/before");
  io.teardown();
  CHECK(slow->lines == std::vector<std::string>{"save /b", "remove /before"});
}

TEST_CASE("what nobody asked about becomes a warning", "[checkpoint]") {
  std::string line;
  set_log_sink([&](const std::string& given) { line = given; });
  {
    auto slow = std::make_shared<SlowIO>();
    std::promise<void> go;
    slow->gate = go.get_future().share();
    slow->fails = true;
    AsyncCheckpointIO io(slow);
    io.save(weights(1), "/a");
    go.set_value();
  }
  set_log_sink(nullptr);
  CHECK_THAT(line, Contains("not saved: no room for /a"));
}

TEST_CASE("a program that ends while it saves waits for the file", "[checkpoint]") {
  const TempDir dir;
  const auto path = dir.path("a.ckpt");
  const pid_t child = fork();
  if (child == 0) {
    struct Late : CheckpointIO {
      void save(const State& state, const std::string& to) override {
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
        default_checkpoint_io()->save(state, to);
      }
      State load(const std::string&) override { return {}; }
      void remove(const std::string&) override {}
    };
    auto* io = new AsyncCheckpointIO(std::make_shared<Late>());
    io->save(weights(5), path);
    const pid_t forked = fork();
    if (forked == 0) std::exit(3);  // has no part in the save
    int status = 0;
    waitpid(forked, &status, 0);
    std::exit(WIFEXITED(status) && WEXITSTATUS(status) == 3 ? 7 : 1);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  REQUIRE(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 7);
  CHECK(read_torch_file(path).at("w").as_tensor().sum().item<float>() == 20);
}

TEST_CASE("a Trainer saves in the background by the plugin's name", "[checkpoint]") {
  const TempDir dir;
  TrainerOptions options;
  options.read(Json::parse(R"({"plugins": [{"class_path":
    "lightning.pytorch.plugins.io.AsyncCheckpointIO"}], "max_epochs": 2})"),
               "trainer");
  Trainer trainer(options.accelerator("cpu")
                      .logger(false)
                      .enable_progress_bar(false)
                      .enable_model_summary(false)
                      .default_root_dir(dir.path()));
  trainer.fit(std::make_shared<BoringModule>());
  CHECK(dynamic_cast<AsyncCheckpointIO*>(&trainer.strategy().checkpoint_io()) != nullptr);
  CHECK(fs::exists(dir.path("checkpoints/epoch=1-step=8.ckpt")));
  CHECK_FALSE(fs::exists(dir.path("checkpoints/epoch=0-step=4.ckpt")));
}

TEST_CASE("an asynchronous writer does not write with another", "[checkpoint]") {
  CHECK_THROWS_AS(AsyncCheckpointIO(std::make_shared<AsyncCheckpointIO>()), MisconfigurationError);
}

// Run by hand, to measure: async_io_test "the stall of saving 1 GiB"
TEST_CASE("the stall of saving 1 GiB", "[.measure]") {
  const TempDir dir;
  State state = State::dict();
  for (int i = 0; i < 64; ++i) state[str("w", i)] = at::ones({4 << 20});
  AsyncCheckpointIO io;
  for (int i = 0; i < 4; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    io.save(state, dir.path("a.ckpt"));
    const auto stall = io.last_stall_seconds();
    io.load(dir.path("a.ckpt"));
    WARN("stall " << stall << " s, until on the disk "
                  << std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count()
                  << " s");
  }
}
