#include "lightning/distributed/launcher.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "lightning/distributed/last_words.h"
#include "lightning/errors.h"

extern char** environ;

namespace lightning {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr const char* kLauncherVariable = "LIGHTNING_LAUNCHER_PID";
constexpr int64_t kMostLocalRanks = 1024;
// How often the ends of processes are looked for.
constexpr milliseconds kLook{50};

// Of processes that run.
std::array<std::atomic<pid_t>, kMostLocalRanks> running{};
std::atomic<int64_t> count_running{0};

struct Listener {
  std::mutex mutex;
  ChildListener call;
};
Listener& listener() {
  static auto* const one = new Listener;  // used by a thread that no destructor waits for
  return *one;
}

// Where the program was started: arguments may hold paths from there.
const std::string& start_folder() {
  static const auto* const folder = [] {
    std::error_code ignored;
    return new std::string(std::filesystem::current_path(ignored).string());
  }();
  return *folder;
}
const std::string& at_start = start_folder();

std::vector<std::string> own_arguments() {
  std::ifstream file("/proc/self/cmdline", std::ios::binary);
  std::vector<std::string> arguments;
  for (std::string one; std::getline(file, one, '\0');) arguments.push_back(one);
  if (arguments.empty()) throw std::runtime_error("Cannot read /proc/self/cmdline.");
  return arguments;
}

// The program's own path; the file as it was at the start where that was replaced or deleted since.
std::string own_binary() {
  std::error_code failed;
  const auto path = std::filesystem::read_symlink("/proc/self/exe", failed);
  if (failed) return "/proc/self/exe";
  return std::filesystem::equivalent(path, "/proc/self/exe", failed) ? path.string()
                                                                     : "/proc/self/exe";
}

std::vector<std::string> environment_for(const LaunchOptions& options, int64_t local_rank) {
  const std::vector<std::pair<std::string, std::string>> own{
      {"LOCAL_RANK", std::to_string(local_rank)},
      {"NODE_RANK", std::to_string(options.place.node_rank)},
      {"WORLD_SIZE", std::to_string(options.place.world_size)},
      {"MASTER_ADDR", options.main_address},
      {"MASTER_PORT", std::to_string(options.main_port)},
      {kLauncherVariable, std::to_string(::getpid())}};
  std::vector<std::string> all;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string text = *entry;
    const auto name = text.substr(0, text.find('='));
    bool replaced = name == "RANK";  // says another thing to each
    for (const auto& item : own) replaced = replaced || item.first == name;
    if (!replaced) all.push_back(text);
  }
  for (const auto& [name, value] : own) all.push_back(name + "=" + value);
  return all;
}

std::vector<char*> pointers(std::vector<std::string>& texts) {
  std::vector<char*> all;
  for (auto& text : texts) all.push_back(text.data());
  all.push_back(nullptr);
  return all;
}

// Between fork and exec: calls that are safe in a copy of a process with threads.
[[noreturn]] void become(const char* binary, const char* folder, char* const* arguments,
                         char* const* environment, pid_t parent, int reason_fd) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != parent) ::_exit(1);  // it died in between
  sigset_t none;
  sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);
  for (const int number : {SIGINT, SIGTERM, SIGPIPE}) ::signal(number, SIG_DFL);
  const int empty = ::open("/dev/null", O_RDONLY);
  if (empty >= 0) ::dup2(empty, STDIN_FILENO);
  if (*folder != '\0' && ::chdir(folder) != 0) {
    // It is gone; the program may still do without.
  }
  ::execve(binary, arguments, environment);
  const int reason = errno;
  if (::write(reason_fd, &reason, sizeof reason) != sizeof reason) ::_exit(126);
  ::_exit(127);
}

// Starts one process. Errors: std::runtime_error with the system's reason.
pid_t spawn(const std::string& binary, std::vector<std::string> arguments,
            std::vector<std::string> environment) {
  auto argv = pointers(arguments);
  auto envp = pointers(environment);
  int ends[2];
  const auto fail = [&](int reason) {
    throw std::runtime_error(
        str("Cannot start ", binary, " again for another rank: ", std::strerror(reason), "."));
  };
  if (::pipe2(ends, O_CLOEXEC) != 0) fail(errno);
  const pid_t parent = ::getpid();
  const pid_t pid = ::fork();
  if (pid == 0) {
    become(binary.c_str(), start_folder().c_str(), argv.data(), envp.data(), parent, ends[1]);
  }
  const int forked = errno;
  ::close(ends[1]);
  int reason = 0;
  const bool failed = pid > 0 && ::read(ends[0], &reason, sizeof reason) == sizeof reason;
  ::close(ends[0]);
  if (pid < 0) fail(forked);
  if (failed) {
    ::waitpid(pid, nullptr, 0);
    fail(reason);
  }
  return pid;
}

std::string describe(int status) {
  if (WIFEXITED(status)) return str("exit status ", WEXITSTATUS(status));
  const int number = WTERMSIG(status);
  return str("signal ", number, " (", ::strsignal(number), ")");
}

void tell(int64_t rank, const LaunchOptions& options, int status) {
  const bool success = WIFEXITED(status) && WEXITSTATUS(status) == 0;
  ChildListener call;
  {
    const std::lock_guard<std::mutex> lock(listener().mutex);
    call = listener().call;
  }
  if (call) return call(rank, success, describe(status));
  last_words(str("Rank ", rank, " of ", options.place.world_size, " on host ", host_name(),
                 " ended with ", describe(status),
                 " before it joined the run. All processes of this node end.\n"));
  kill_local_ranks();
  end_process(1);
}

void watch_over(const LaunchOptions& options, const std::vector<pid_t>& pids) {
  size_t left = pids.size();
  std::vector<bool> ended(pids.size());
  while (left > 0) {
    for (size_t i = 0; i < pids.size(); ++i) {
      if (ended[i]) continue;
      siginfo_t ready{};
      const auto id = static_cast<id_t>(pids[i]);
      if (::waitid(P_PID, id, &ready, WEXITED | WNOHANG | WNOWAIT) == 0 && ready.si_pid == 0) {
        continue;
      }
      ended[i] = true;
      --left;
      running[i] = 0;  // before its number is free for another process
      --count_running;
      int status = 0;
      const pid_t result = ::waitpid(pids[i], &status, 0);
      // Somebody else in the program may have taken its end: nothing is known of it then.
      const auto local_rank = static_cast<int64_t>(i) + 1;
      const int64_t rank = options.place.global_rank + local_rank;
      if (result == pids[i]) tell(rank, options, status);
    }
    std::this_thread::sleep_for(kLook);
  }
}

}  // namespace

// The thread that forks stays as long as the process: the kernel ends a child with its parent's
// *thread*.
void start_local_ranks(const LaunchOptions& options) {
  static std::atomic<bool> called{false};
  if (called.exchange(true)) throw std::logic_error("The ranks of a node are started once.");
  if (options.local_size > kMostLocalRanks) {
    throw std::runtime_error(str("Cannot start ", options.local_size, " processes on a node, ",
                                 kMostLocalRanks, " at most."));
  }
  std::string error;
  std::atomic<bool> started{false};
  std::thread([&error, &started, options] {
    std::vector<pid_t> pids;
    try {
      const auto binary = own_binary();
      const auto arguments = own_arguments();
      for (int64_t local_rank = 1; local_rank < options.local_size; ++local_rank) {
        pids.push_back(spawn(binary, arguments, environment_for(options, local_rank)));
        running[pids.size() - 1] = pids.back();
        ++count_running;
      }
    } catch (const std::exception& exception) {
      error = exception.what();
      kill_local_ranks();
      started = true;
      return;
    }
    started = true;  // what was captured by reference is gone from here on
    watch_over(options, pids);
  }).detach();
  while (!started) std::this_thread::sleep_for(milliseconds(1));
  if (!error.empty()) throw std::runtime_error(error);
}

bool started_by_launcher() {
  const char* pid = std::getenv(kLauncherVariable);
  return pid != nullptr && std::atoll(pid) == ::getppid();
}

void outlive_launcher() {
  if (started_by_launcher()) ::prctl(PR_SET_PDEATHSIG, 0);
}

void set_child_listener(ChildListener call) {
  const std::lock_guard<std::mutex> lock(listener().mutex);
  listener().call = std::move(call);
}

bool local_ranks_run() { return count_running > 0; }

bool wait_for_local_ranks(milliseconds limit) {
  const auto end = steady_clock::now() + limit;
  while (local_ranks_run()) {
    if (steady_clock::now() >= end) return false;
    std::this_thread::sleep_for(kLook);
  }
  return true;
}

void kill_local_ranks() {
  for (const auto& one : running) {
    const pid_t pid = one.load();
    if (pid > 0) ::kill(pid, SIGKILL);
  }
}

}  // namespace lightning
