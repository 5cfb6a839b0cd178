// The end of a process that nothing may delay: other processes wait for it.
#pragma once

#include <string>

namespace lightning {

std::string host_name();

// A text on stderr, at once, past what other threads hold.
void last_words(const std::string& text);

// Ends the process without destructors, which may wait for processes that are gone. What the
// program's streams hold is written if no thread is in the way.
[[noreturn]] void end_process(int status);

}  // namespace lightning
