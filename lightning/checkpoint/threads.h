// A few threads for work on many bytes: CRCs and writing.
#pragma once

#include <cstdint>
#include <functional>

namespace lightning {

// How many help with so many bytes: one for each core, four at most, fewer for little work.
int useful_threads(uint64_t bytes);

// Runs `work` on that many threads at once, the calling one among them, and waits for all. With
// fewer where the system gives no more.
// Errors: the first that a thread threw.
void on_threads(int threads, const std::function<void()>& work);

}  // namespace lightning
