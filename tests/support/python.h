// Runs the Python that holds the original, to compare with it.
//
// The interpreter is $LIGHTNING_PYTHON, else .venv/bin/python of the working directory.
#pragma once

#include <string>
#include <vector>

namespace lightning::testing {

// Runs the script (its text) with `arguments` as sys.argv[1:] and gives what it printed.
// Errors: std::runtime_error with all that it wrote to stderr, for an exit status other than 0.
std::string run_python(const std::string& script, const std::vector<std::string>& arguments = {});

}  // namespace lightning::testing
