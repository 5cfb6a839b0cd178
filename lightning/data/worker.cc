#include "lightning/data/worker.h"

#include <ATen/CPUGeneratorImpl.h>

namespace lightning {
namespace {

struct ThreadState {
  const WorkerInfo* info = nullptr;
  bool loading = false;
  bool seeded = false;  // has the generator begun this batch?
  uint64_t batch_seed = 0;
  at::Generator generator;
};

ThreadState& thread_state() {
  thread_local ThreadState state;
  return state;
}

// The finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators).
uint64_t scramble(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

}  // namespace

const WorkerInfo* worker_info() { return thread_state().info; }

void set_worker_info(const WorkerInfo* info) { thread_state().info = info; }

// Seeded at the first use in a batch: a data set that draws nothing pays nothing.
at::Generator& worker_generator() {
  ThreadState& state = thread_state();
  if (!state.loading) {
    thread_local at::Generator outside;
    outside = at::detail::getDefaultCPUGenerator();
    return outside;
  }
  if (!state.generator.defined()) state.generator = at::detail::createCPUGenerator();
  if (!state.seeded) state.generator.set_current_seed(state.batch_seed);
  state.seeded = true;
  return state.generator;
}

LoadingScope::LoadingScope(uint64_t batch_seed) {
  ThreadState& state = thread_state();
  state.loading = true;
  state.seeded = false;
  state.batch_seed = batch_seed;
}

LoadingScope::~LoadingScope() { thread_state().loading = false; }

uint64_t mix_seed(uint64_t seed, uint64_t a, uint64_t b) {
  return scramble(scramble(scramble(seed) ^ a) ^ b);
}

}  // namespace lightning
