// What the starter of a process tells it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace lightning {

// nullopt where it is not set, or empty.
std::optional<std::string> environment_variable(const char* name);

// A whole number of at least 0. `who` reads it, for errors: "TorchElasticEnvironment".
// Errors: MisconfigurationError where it is not set, or is none.
int64_t environment_number(const char* name, const char* who);
// As above; nullopt where it is not set.
std::optional<int64_t> optional_number(const char* name, const char* who);

// MASTER_PORT; nullopt where it is not set. Errors: MisconfigurationError for what is no port.
std::optional<int64_t> given_main_port(const char* who);

}  // namespace lightning
