// What the programs in tools/ do alike: arguments, errors, exit status.
#pragma once

#include <CLI/CLI.hpp>
#include <exception>
#include <functional>
#include <ostream>
#include <string>
#include <vector>

namespace lightning::tools {

constexpr int kBroken = 1;   // a checkpoint that is broken or cannot be written
constexpr int kMisused = 2;  // arguments that make no sense

// Parses the arguments (without the program's name), which name one of the app's commands, and
// calls `work`, which gives the exit status. Errors and what the library logs go to `err`,
// escaped().
int run_program(CLI::App& app, const std::vector<std::string>& arguments,
                const std::function<int()>& work, std::ostream& out, std::ostream& err);

// Without the stack trace that LibTorch's errors bring along, escaped().
std::string message_of(const std::exception& error);

}  // namespace lightning::tools
