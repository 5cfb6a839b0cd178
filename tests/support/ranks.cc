#include "tests/support/ranks.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <thread>

namespace lightning::testing {
namespace {

constexpr const char* kFolder = "LIGHTNING_TEST_RANKS";

std::string text_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// Processes that were started for the run in this folder, wherever they are now.
std::vector<pid_t> processes_of(const std::string& folder) {
  std::vector<pid_t> found;
  const auto sign = std::string(kFolder) + "=" + folder;
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    const auto name = entry.path().filename().string();
    if (name.find_first_not_of("0123456789") != std::string::npos) continue;
    if (text_of(entry.path() / "environ").find(sign) != std::string::npos) {
      found.push_back(std::stoi(name));
    }
  }
  return found;
}

}  // namespace

std::string Ranks::folder() { return variable(kFolder); }

std::string Ranks::variable(const std::string& name) {
  const char* text = std::getenv(name.c_str());
  return text != nullptr ? text : "";
}

std::string Ranks::accelerator() {
  const auto given = variable("LIGHTNING_TEST_ACCELERATOR");
  return given.empty() ? "cpu" : given;
}

std::vector<int64_t> Ranks::counts() {
  if (on_cpu()) return {2, 4};
  return {2};
}

Ended Ranks::run(const std::string& test_case, const Variables& variables,
                 const std::vector<std::string>& launcher, const std::function<void()>& meanwhile,
                 std::chrono::seconds deadline) {
  using Clock = std::chrono::steady_clock;
  auto words = launcher;
  words.push_back(std::filesystem::read_symlink("/proc/self/exe").string());
  words.push_back("\"" + test_case + "\"");  // else a comma would end the name
  words.insert(words.end(), {"-w", "NoTests"});
  const auto output = dir_.path("output");
  const auto end = Clock::now() + deadline;
  const pid_t pid = ::fork();
  if (pid == 0) {
    setenv(kFolder, dir_.path().c_str(), 1);
    for (const auto& [name, value] : variables) {
      value.empty() ? unsetenv(name.c_str()) : setenv(name.c_str(), value.c_str(), 1);
    }
    const int file = ::open(output.c_str(), O_CREAT | O_TRUNC | O_WRONLY | O_APPEND, 0644);
    ::dup2(file, STDOUT_FILENO);
    ::dup2(file, STDERR_FILENO);
    ::setpgid(0, 0);
    std::vector<char*> argv;
    for (auto& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    ::execvp(argv[0], argv.data());
    ::_exit(127);
  }
  if (pid < 0) throw std::runtime_error("fork failed");
  Ended ended;
  ended.status = -1;
  while (true) {
    int status = 0;
    if (::waitpid(pid, &status, WNOHANG) == pid) {
      ended.status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
      break;
    }
    if (Clock::now() > end) {
      ::kill(-pid, SIGKILL);
      ::waitpid(pid, &status, 0);
      break;
    }
    if (meanwhile) meanwhile();
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  const auto grace = Clock::now() + std::chrono::seconds(2);
  auto left = processes_of(dir_.path());
  while (!left.empty() && Clock::now() < grace) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    left = processes_of(dir_.path());
  }
  ended.still_running = static_cast<int>(left.size());
  for (const pid_t one : left) ::kill(one, SIGKILL);
  ended.output = text_of(output);
  return ended;
}

}  // namespace lightning::testing
