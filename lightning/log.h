// Lines for the person who watches the run: on stderr, from rank 0 only.
#pragma once

#include <functional>
#include <string>

namespace lightning {

void info(const std::string& line);
void warn(const std::string& line);

// A warning that is given once in the life of the program for each `key`.
void warn_once(const std::string& line, const std::string& key);
void warn_once(const std::string& line);

// Where lines go meanwhile: a progress bar takes them so that they do not tear it. Empty: stderr.
// Returns the one before.
using LogSink = std::function<void(const std::string& line)>;
LogSink set_log_sink(LogSink sink);
// Rank 0 speaks; the others keep still.
void set_log_rank(int rank);

}  // namespace lightning
