#include "lightning/distributed/slurm.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "lightning/distributed/environment_variable.h"
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

constexpr const char* kName = "SLURMEnvironment";

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
  const auto job = environment_variable("SLURM_JOB_NAME");
  return environment_variable("SLURM_NTASKS") && job != "bash" && job != "interactive";
}

std::optional<int64_t> SLURMEnvironment::processes_per_node() const {
  return optional_number("SLURM_NTASKS_PER_NODE", kName);
}

ProcessPlace SLURMEnvironment::place(int64_t devices, int64_t num_nodes) const {
  ProcessPlace place;
  place.world_size = environment_number("SLURM_NTASKS", kName);
  place.global_rank = environment_number("SLURM_PROCID", kName);
  place.local_rank = environment_number("SLURM_LOCALID", kName);
  place.node_rank = environment_number("SLURM_NODEID", kName);
  const auto refuse = [](const std::string& flag, int64_t given, const char* option, int64_t told) {
    throw MisconfigurationError(str("Trainer got ", flag, "=", given, ", but SLURM was asked for ",
                                    option, "=", told, ". Give ", flag, "=", told, "."));
  };
  const auto per_node = processes_per_node();
  if (!per_node && place.world_size > 1) {
    throw MisconfigurationError(str("SLURM was asked for --ntasks=", place.world_size,
                                    " without saying how many a node has. Give sbatch and srun "
                                    "--ntasks-per-node=",
                                    devices, " and --nodes=", num_nodes, " instead."));
  }
  if (per_node && *per_node != devices) refuse("devices", devices, "--ntasks-per-node", *per_node);
  const auto nodes = optional_number("SLURM_NNODES", kName);
  if (nodes && *nodes != num_nodes) refuse("num_nodes", num_nodes, "--nodes", *nodes);
  if (place.world_size != devices * num_nodes) {
    throw MisconfigurationError(str("Trainer got devices=", devices, " and num_nodes=", num_nodes,
                                    ", which makes ", devices * num_nodes,
                                    " processes, but SLURM started ", place.world_size,
                                    " (SLURM_NTASKS). Start the program with srun, and change one "
                                    "of them."));
  }
  if (place.global_rank >= place.world_size || place.local_rank >= devices) {
    throw MisconfigurationError(str("SLURM gives this process the rank ", place.global_rank, " of ",
                                    place.world_size, " and the local rank ", place.local_rank,
                                    " of ", devices,
                                    ". Ranks count from 0: its variables are mixed up."));
  }
  return place;
}

std::string SLURMEnvironment::first_host(const std::string& nodes) {
  auto host = nodes.substr(0, nodes.find_first_of(" ,["));
  const auto open = host.size();
  if (open == nodes.size() || nodes[open] != '[') return host;
  const auto close = nodes.find(']', open);
  if (close == std::string::npos) return host;
  host += nodes.substr(open + 1, nodes.find_first_of(",-]", open) - open - 1);
  const auto rest = nodes.substr(close + 1);
  return host + rest.substr(0, rest.find_first_of(" ,"));
}

std::string SLURMEnvironment::main_address() const {
  if (const auto address = environment_variable("MASTER_ADDR")) return *address;
  return first_host(environment_variable("SLURM_NODELIST").value_or("127.0.0.1"));
}

int64_t SLURMEnvironment::main_port() const {
  if (const auto port = given_main_port(kName)) return *port;
  const auto job = environment_variable("SLURM_JOB_ID");
  if (!job) return 12910;
  const auto digits = job->substr(job->size() < 4 ? 0 : job->size() - 4);
  if (digits.find_first_not_of("0123456789") != std::string::npos) return 12910;
  return 15000 + std::stoll(digits);
}

std::optional<std::string> SLURMEnvironment::job_id() {
  const auto array = environment_variable("SLURM_ARRAY_JOB_ID");
  const auto task = environment_variable("SLURM_ARRAY_TASK_ID");
  if (array && task) return *array + "_" + *task;
  return environment_variable("SLURM_JOB_ID");
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
