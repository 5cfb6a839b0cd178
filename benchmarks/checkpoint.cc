// What it takes to save and load. The peer is checkpoint.py, which does the same with Python
// Lightning and torch; both work in the folder they are started in.
//
//   checkpoint save     1 GiB in 64 tensors, on the disk (fsync)            save_s, of the best
//   checkpoint memory   the same: what the process grows by meanwhile       extra_mib
//   checkpoint stall    the same with AsyncCheckpointIO: how long training  stall_ms and copy_ms,
//                       stands still                                        that of a plain copy;
//                                                                           first_stall_ms, while
//                                                                           its memory is new
//   checkpoint load     1 GiB read whole, with its CRCs checked             load_s
//   checkpoint open     the same file opened lazily                         open_ms
//   checkpoint small    50,000 small tensors opened                         small_ms
//
// A further word is for the peer.
#include <ATen/Functions.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "lightning/checkpoint/async_io.h"
#include "lightning/checkpoint/torch_file.h"

namespace {

using lightning::State;

constexpr int kRounds = 3;

double seconds(const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double best(const std::function<void()>& work) {
  double least = seconds(work);
  for (int round = 1; round < kRounds; ++round) least = std::min(least, seconds(work));
  return least;
}

State state(int64_t tensors, int64_t numbers) {
  auto weights = State::ordered_dict();
  for (int64_t i = 0; i < tensors; ++i) {
    weights["layer." + std::to_string(i)] = at::randn({numbers});
  }
  return State::dict({{"state_dict", std::move(weights)}});
}

State one_gib() { return state(64, int64_t{4} << 20); }

// In MiB. `name`: VmRSS, or VmHWM, the most since reset_peak().
double memory(const char* name) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind(name, 0) == 0) return std::stod(line.substr(std::strlen(name) + 1)) / 1024;
  }
  return 0;
}
void reset_peak() { std::ofstream("/proc/self/clear_refs") << "5"; }

void save() {
  const auto checkpoint = one_gib();
  const double least = best([&] { lightning::write_torch_file(checkpoint, "one.ckpt"); });
  std::printf("save_s %.3f\n", least);
}

void extra_memory() {
  const auto checkpoint = one_gib();
  reset_peak();
  const double before = memory("VmRSS");
  lightning::write_torch_file(checkpoint, "one.ckpt");
  std::printf("extra_mib %.0f\n", memory("VmHWM") - before);
}

void stall() {
  const auto checkpoint = one_gib();
  std::vector<at::Tensor> copies;
  const auto& weights = checkpoint.at("state_dict").as_dict();
  for (const auto& item : weights) copies.push_back(at::empty_like(item.second.as_tensor()));
  const double copy = best([&] {
    size_t i = 0;
    for (const auto& item : weights) copies[i++].copy_(item.second.as_tensor());
  });
  copies.clear();
  lightning::AsyncCheckpointIO io;
  std::vector<double> stalls;
  for (int round = 0; round < kRounds + 1; ++round) {
    stalls.push_back(seconds([&] { io.save(checkpoint, "one.ckpt"); }));
    io.load("one.ckpt");  // as if training went on until it was written
  }
  io.teardown();
  std::printf("copy_ms %.1f\nstall_ms %.1f\nfirst_stall_ms %.1f\n", copy * 1e3,
              *std::min_element(stalls.begin() + 1, stalls.end()) * 1e3, stalls[0] * 1e3);
}

void load(bool whole) {
  lightning::write_torch_file(one_gib(), "one.ckpt");
  const double least = best([&] { lightning::read_torch_file("one.ckpt", /*verify=*/whole); });
  whole ? std::printf("load_s %.4f\n", least) : std::printf("open_ms %.2f\n", least * 1e3);
}

void small() {
  lightning::write_torch_file(state(50'000, 8), "small.ckpt");
  const double least = best([] { lightning::read_torch_file("small.ckpt", /*verify=*/false); });
  std::printf("small_ms %.1f\n", least * 1e3);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "save") {
    save();
  } else if (what == "memory") {
    extra_memory();
  } else if (what == "stall") {
    stall();
  } else if (what == "load" || what == "open") {
    load(what == "load");
  } else if (what == "small") {
    small();
  } else {
    std::fprintf(stderr,
                 "checkpoint got \"%s\", expected save, memory, stall, load, open or small\n",
                 what.c_str());
    return 2;
  }
}
