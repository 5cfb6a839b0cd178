// The program `fabric`, but for the streams it writes to.
#pragma once

#include <ostream>
#include <string>
#include <vector>

namespace lightning::tools {

// Does what the arguments (without the program's name) say. Gives the exit status: 0; 1 for a
// folder that is no sharded checkpoint or is broken, and for a file that is there or cannot be
// written; 2 for arguments that make no sense. Errors go to `err`, escaped().
// Source: Lightning 2.6, `fabric`.
int run_fabric(const std::vector<std::string>& arguments, std::ostream& out, std::ostream& err);

}  // namespace lightning::tools
