#include "lightning/checkpoint/threads.h"

#include <algorithm>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace lightning {

int useful_threads(uint64_t bytes, int most) {
  // A thread starts in about 20 us, in which another handles 200 KB.
  constexpr uint64_t kWorthAThread = uint64_t{4} << 20;
  const uint64_t cores = std::max(1u, std::thread::hardware_concurrency());
  return static_cast<int>(
      std::min({static_cast<uint64_t>(most), cores, 1 + bytes / kWorthAThread}));
}

void on_threads(int threads, const std::function<void()>& work) {
  std::mutex mutex;
  std::exception_ptr first_error;
  const auto guarded = [&] {
    try {
      work();
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (first_error == nullptr) first_error = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(std::max(threads - 1, 0)));
  try {
    while (static_cast<int>(others.size()) + 1 < threads) others.emplace_back(guarded);
  } catch (const std::system_error&) {
    // No more threads here. Those there are do it all.
  }
  guarded();
  for (auto& thread : others) thread.join();
  if (first_error != nullptr) std::rethrow_exception(first_error);
}

}  // namespace lightning
