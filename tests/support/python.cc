#include "tests/support/python.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <sstream>
#include <stdexcept>

#include "tests/support/temp_dir.h"

namespace lightning::testing {
namespace {

std::string read(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

}  // namespace

std::string run_python(const std::string& script, const std::vector<std::string>& arguments) {
  const TempDir dir;
  const std::string file = dir.path("script.py");
  const std::string out = dir.path("stdout");
  const std::string err = dir.path("stderr");
  std::ofstream(file) << script;
  const char* set = std::getenv("LIGHTNING_PYTHON");
  const std::string python = set != nullptr ? set : ".venv/bin/python";

  const pid_t child = fork();
  if (child == 0) {
    setenv("OMP_NUM_THREADS", "1", 1);
    setenv("PYTHONWARNINGS", "ignore", 1);
    if (freopen(out.c_str(), "w", stdout) == nullptr ||
        freopen(err.c_str(), "w", stderr) == nullptr) {
      _exit(126);
    }
    std::vector<char*> argv = {const_cast<char*>(python.c_str()), const_cast<char*>(file.c_str())};
    for (const auto& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
    argv.push_back(nullptr);
    execvp(argv[0], argv.data());
    _exit(127);
  }
  int status = 0;
  waitpid(child, &status, 0);
  if (status != 0) {
    throw std::runtime_error(python + " ended with status " + std::to_string(WEXITSTATUS(status)) +
                             ":\n" + read(err));
  }
  return read(out);
}

}  // namespace lightning::testing
