// A few threads for work on many bytes: CRCs and writing.
#pragma once

#include <cstdint>
#include <functional>

namespace lightning {

// More of them seldom make memory faster.
constexpr int kMostThreads = 4;
// Where pages of a file have to be found too, they do.
constexpr int kMostReaders = 8;

// How many help with so many bytes: one for each core, `most` at most, fewer for little work.
int useful_threads(uint64_t bytes, int most = kMostThreads);

// Runs `work` on that many threads at once, the calling one among them, and waits for all. With
// fewer where the system gives no more.
// Errors: the first that a thread threw.
void on_threads(int threads, const std::function<void()>& work);

}  // namespace lightning
