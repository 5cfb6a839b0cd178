#include "lightning/distributed/last_words.h"

#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <memory>
#include <thread>

namespace lightning {

std::string host_name() {
  std::array<char, 256> name{};
  return ::gethostname(name.data(), name.size() - 1) == 0 ? name.data() : "?";
}

void last_words(const std::string& text) {
  size_t written = 0;
  while (written < text.size()) {
    const auto bytes = ::write(STDERR_FILENO, text.data() + written, text.size() - written);
    if (bytes <= 0) return;
    written += static_cast<size_t>(bytes);
  }
}

// Another thread may stop while it holds a stream: flushing is given a moment, on a thread of its
// own.
void end_process(int status) {
  const auto done = std::make_shared<std::atomic<bool>>(false);
  std::thread([done] {
    std::fflush(nullptr);
    *done = true;
  }).detach();
  for (int i = 0; i < 50 && !*done; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  ::_exit(status);
}

}  // namespace lightning
