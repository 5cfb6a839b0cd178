// Random numbers that are the same on every machine, which std's distributions are not.
// Source: Steele and others, "Fast Splittable Pseudorandom Number Generators" (SplitMix64).
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>

namespace lightning::fuzz {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  // From 0 to `end` - 1; 0 where `end` is 0.
  size_t below(size_t end) { return end == 0 ? 0 : static_cast<size_t>(next() % end); }
  bool one_in(size_t times) { return below(times) == 0; }

  template <class List>
  const auto& pick(const List& list) {
    return *(std::begin(list) + static_cast<std::ptrdiff_t>(below(std::size(list))));
  }

 private:
  uint64_t state_;
};

}  // namespace lightning::fuzz
