// The errors of the house. What happened with the values, what was expected, what to do next.
// The type says who can act.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace lightning {

// The user can act: a flag, an option, a hook that was left out. Thrown before work starts wherever
// that is possible.
class MisconfigurationError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// Whoever holds the file can act: it is torn, of another model, or not there.
class CheckpointError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Ctrl-C reached a batch boundary. Source: Python's `KeyboardInterrupt`.
class KeyboardInterrupt : public std::runtime_error {
 public:
  KeyboardInterrupt() : std::runtime_error("interrupted from the keyboard (SIGINT)") {}
};

// SIGTERM reached a batch boundary. Source: Lightning 2.6, `SIGTERMException`.
class SIGTERMException : public std::runtime_error {
 public:
  SIGTERMException() : std::runtime_error("ended by SIGTERM") {}
};

// Joins its arguments as `std::ostream` prints them: `str("got ", 3, " of ", 8)`.
// An object, so that the name is never looked up in c10, which has a function `str` too.
struct Str {
  template <class... Args>
  std::string operator()(const Args&... args) const {
    std::ostringstream out;
    (out << ... << args);
    return out.str();
  }
};
inline constexpr Str str{};

// "a, b, c".
std::string join(const std::vector<std::string>& words, const std::string& separator = ", ");

// ` Did you mean "fsdp"?` for names at a small edit distance from `name` (or that `name` is a part
// of), best first, three at most; empty where none is near.
std::string did_you_mean(const std::string& name, const std::vector<std::string>& known);

}  // namespace lightning
