#include "lightning/distributed/environment_variable.h"

#include <cerrno>
#include <cstdlib>

#include "lightning/errors.h"

namespace lightning {

std::optional<std::string> environment_variable(const char* name) {
  const char* text = std::getenv(name);
  return text != nullptr && *text != '\0' ? std::optional<std::string>(text) : std::nullopt;
}

std::optional<int64_t> optional_number(const char* name, const char* who) {
  const auto text = environment_variable(name);
  if (!text) return std::nullopt;
  char* end = nullptr;
  errno = 0;
  const int64_t number = std::strtoll(text->c_str(), &end, 10);
  if (*end != '\0' || errno != 0 || number < 0) {
    throw MisconfigurationError(str(who, " reads ", name, " from the environment, which is \"",
                                    *text, "\", expected a whole number of at least 0."));
  }
  return number;
}

int64_t environment_number(const char* name, const char* who) {
  if (const auto number = optional_number(name, who)) return *number;
  throw MisconfigurationError(str(who, " reads ", name,
                                  " from the environment, which is not set. Start the program with "
                                  "the launcher that sets it, or set it for each process."));
}

std::optional<int64_t> given_main_port(const char* who) {
  const auto port = optional_number("MASTER_PORT", who);
  if (port && (*port < 1 || *port > 65535)) {
    throw MisconfigurationError(str(who, " reads MASTER_PORT from the environment, which is ",
                                    *port, ", expected a port from 1 to 65535."));
  }
  return port;
}

}  // namespace lightning
