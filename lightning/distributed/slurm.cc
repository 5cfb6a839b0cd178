#include "lightning/distributed/slurm.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "lightning/errors.h"
#include "lightning/registry.h"

extern char** environ;

namespace lightning {
namespace {

const Registration<ClusterEnvironment> kSLURMEnvironment{
    "SLURMEnvironment", "Saves and requeues a job of SLURM before its time is up.",
    [](const SLURMEnvironmentOptions& options) {
      return std::make_unique<SLURMEnvironment>(options);
    }};

std::optional<std::string> variable(const char* name) {
  const char* text = std::getenv(name);
  return text != nullptr && *text != '\0' ? std::optional<std::string>(text) : std::nullopt;
}

// "SIGUSR1", "USR1" or "10".
int signal_of(const std::string& name) {
  const std::string_view bare = name.rfind("SIG", 0) == 0 ? std::string_view(name).substr(3) : name;
  for (int number = 1; number < NSIG; ++number) {
    const char* known = sigabbrev_np(number);
    if ((known != nullptr && bare == known) || name == std::to_string(number)) return number;
  }
  throw MisconfigurationError(str("SLURMEnvironment got requeue_signal \"", name,
                                  "\", expected the name of a signal, as \"SIGUSR1\" or "
                                  "\"SIGUSR2\"."));
}

// A program with its output.
class Command {
 public:
  explicit Command(const std::vector<std::string>& words) : name_(words.front()) {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0) fail(errno);
    out_ = ends[0];
    posix_spawn_file_actions_t actions;
    ::posix_spawn_file_actions_init(&actions);
    ::posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
    ::posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
    ::posix_spawn_file_actions_adddup2(&actions, ends[1], STDERR_FILENO);
    std::vector<char*> arguments;
    for (const auto& word : words) arguments.push_back(const_cast<char*>(word.c_str()));
    arguments.push_back(nullptr);
    const int rc =
        ::posix_spawnp(&pid_, name_.c_str(), &actions, nullptr, arguments.data(), environ);
    ::posix_spawn_file_actions_destroy(&actions);
    ::close(ends[1]);
    if (rc != 0) {
      ::close(out_);
      fail(rc);
    }
  }
  ~Command() { ::close(out_); }
  Command(const Command&) = delete;
  Command& operator=(const Command&) = delete;

  // Its exit status; ends it when it takes too long.
  int wait(std::chrono::seconds timeout) {
    const auto end = std::chrono::steady_clock::now() + timeout;
    while (true) {
      const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
          end - std::chrono::steady_clock::now());
      pollfd ready{out_, POLLIN, 0};
      const int rc = ::poll(&ready, 1, static_cast<int>(std::max<int64_t>(left.count(), 0)));
      if (rc < 0 && errno == EINTR) continue;
      if (rc == 0) {
        output_ += str("\n(no answer in ", timeout.count(), " s)");
        ::kill(pid_, SIGKILL);
        break;
      }
      char text[512];
      const ssize_t bytes = ::read(out_, text, sizeof text);
      if (bytes < 0 && errno == EINTR) continue;
      if (bytes <= 0) break;
      if (output_.size() < kMostOutput) output_.append(text, static_cast<size_t>(bytes));
    }
    int status = 0;
    while (::waitpid(pid_, &status, 0) < 0 && errno == EINTR) {
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }
  const std::string& output() const { return output_; }

 private:
  static constexpr size_t kMostOutput = 4096;

  [[noreturn]] void fail(int reason) const {
    throw std::runtime_error(str("Cannot run ", name_, ": ", std::strerror(reason), "."));
  }

  std::string name_;
  pid_t pid_ = 0;
  int out_ = -1;
  std::string output_;
};

}  // namespace

SLURMEnvironment::SLURMEnvironment(const SLURMEnvironmentOptions& options)
    : auto_requeue_(options.auto_requeue()), requeue_signal_(signal_of(options.requeue_signal())) {
  for (const int other : {SIGTERM, SIGINT, SIGKILL, SIGSTOP, SIGSEGV, SIGBUS, SIGCHLD}) {
    if (requeue_signal_ == other) {
      throw MisconfigurationError(str("SLURMEnvironment got requeue_signal \"",
                                      options.requeue_signal(),
                                      "\", which has another meaning. Give \"SIGUSR1\" or "
                                      "\"SIGUSR2\", and the same to sbatch --signal."));
    }
  }
}

bool SLURMEnvironment::detect() {
  const auto job = variable("SLURM_JOB_NAME");
  return variable("SLURM_NTASKS") && job != "bash" && job != "interactive";
}

std::optional<std::string> SLURMEnvironment::job_id() {
  const auto array = variable("SLURM_ARRAY_JOB_ID");
  const auto task = variable("SLURM_ARRAY_TASK_ID");
  if (array && task) return *array + "_" + *task;
  return variable("SLURM_JOB_ID");
}

void SLURMEnvironment::requeue(std::chrono::seconds timeout) const {
  const auto id = job_id();
  if (!id || id->find_first_not_of("0123456789_-") != std::string::npos) {
    throw std::runtime_error(str("SLURM_JOB_ID is ",
                                 id ? "\"" + *id + "\", which is no job's number" : "not set",
                                 ", so the job cannot be requeued."));
  }
  Command command({"scontrol", "requeue", *id});
  const int status = command.wait(timeout);
  if (status == 0) return;
  auto output = command.output();
  while (!output.empty() && output.back() == '\n') output.pop_back();
  throw std::runtime_error(str("scontrol requeue ", *id, " ended with status ", status,
                               output.empty() ? "" : ": ", output));
}

}  // namespace lightning
