// The program `lightning`, but for the streams it writes to.
#pragma once

#include <ostream>
#include <string>
#include <vector>

namespace lightning::tools {

// Does what the arguments (without the program's name) say. Gives the exit status: 0; 1 for a
// checkpoint that is broken or cannot be written; 2 for arguments that make no sense and, with
// verify, for a file that cannot be opened. Errors and notes go to `err`, escaped().
int run(const std::vector<std::string>& arguments, std::ostream& out, std::ostream& err);

}  // namespace lightning::tools
