#include "lightning/distributed/join_notice.h"

#include <string.h>

#include <algorithm>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "lightning/distributed/environment_variable.h"
#include "lightning/distributed/last_words.h"
#include "lightning/distributed/launcher.h"
#include "lightning/distributed/watch.h"
#include "lightning/errors.h"

namespace lightning {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
using std::chrono::seconds;

// Longer than programs need to start.
constexpr seconds kQuiet{10};
constexpr milliseconds kLook{100};

// What an environment reads a place from, as far as it is set.
std::vector<std::pair<std::string, std::string>> variables_of(const std::string& environment) {
  std::vector<const char*> names{"RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE"};
  if (environment == "LightningEnvironment") names.erase(names.begin());  // it reads no RANK
  if (environment == "TorchElasticEnvironment") names.insert(names.begin(), "TORCHELASTIC_RUN_ID");
  if (environment == "SLURMEnvironment") names = {"SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"};
  if (environment == "MPIEnvironment") {
    names = {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"};
  }
  std::vector<std::pair<std::string, std::string>> set;
  for (const char* name : names) {
    if (const auto value = environment_variable(name)) set.emplace_back(name, *value);
  }
  return set;
}

}  // namespace

milliseconds join_timeout(milliseconds of_collectives) {
  const auto given = optional_number("LIGHTNING_JOIN_TIMEOUT", "The start of a run");
  return given ? seconds(*given) : std::max<milliseconds>(of_collectives, std::chrono::minutes(30));
}

std::string described_place(const ProcessPlace& place, const ClusterEnvironment& environment) {
  std::vector<std::string> read;
  for (const auto& [name, value] : variables_of(environment.name())) {
    read.push_back(name + "=" + value);
  }
  const auto from = read.empty() ? std::string("the Trainer's devices and num_nodes")
                                 : join(read) + " in the environment";
  return str("this is rank ", place.global_rank, " of ", place.world_size, " by ", from, " (",
             environment.name(), ")");
}

std::string advice(const ProcessPlace& place, const ClusterEnvironment& environment) {
  if (!environment.creates_processes_externally() || started_by_launcher()) return "";
  std::string names;
  for (const auto& [name, value] : variables_of(environment.name())) names += " " + name;
  return str(" These variables say that somebody else starts all ", place.world_size,
             " ranks. Start them, as torchrun does; or, where the variables were only left in the "
             "shell, say `unset",
             names, "`, and the program starts its ranks itself.");
}

struct JoinNotice::State {
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
};

JoinNotice::JoinNotice(std::function<std::string()> text) : state_(std::make_shared<State>()) {
  thread_ = std::thread([state = state_, text = std::move(text)] {
    const auto speaks_at = Clock::now() + kQuiet;
    bool spoke = started_by_launcher();  // which speaks for all that it started
    std::unique_lock<std::mutex> lock(state->mutex);
    while (!state->changed.wait_for(lock, kLook, [&] { return state->done; })) {
      const int number = Watch::stop_signal();
      if (number != 0) {
        last_words(str("Ended by SIG", ::sigabbrev_np(number), ". ", text(), "\n"));
        kill_local_ranks();
        end_process(128 + number);
      }
      if (spoke || Clock::now() < speaks_at) continue;
      spoke = true;
      if (const auto words = text(); !words.empty()) last_words(words + "\n");
    }
  });
}

JoinNotice::~JoinNotice() {
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    state_->done = true;
    state_->changed.notify_all();
  }
  thread_.join();
}

}  // namespace lightning
