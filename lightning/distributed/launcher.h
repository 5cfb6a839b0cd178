// Starts the other processes of a node: this program again, with its own arguments, for each local
// rank but 0. Code before the Trainer runs in every one of them.
//
// They hold the environment of this process and LOCAL_RANK, NODE_RANK, WORLD_SIZE, MASTER_ADDR,
// MASTER_PORT; their standard input is empty. A thread waits for their ends. When this process dies
// before they have joined the run the kernel ends them; from then on the Watch does.
// Source: Lightning 2.6, `_SubprocessScriptLauncher`.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>

#include "lightning/distributed/cluster_environment.h"

namespace lightning {

struct LaunchOptions {
  ProcessPlace place;  // of this process
  int64_t local_size = 1;
  std::string main_address;
  int64_t main_port = 0;
};

// Errors: std::runtime_error with the system's reason; std::logic_error for a second call.
void start_local_ranks(const LaunchOptions& options);

// Whether this process was started so, by the process that is its parent.
bool started_by_launcher();
// The parent's end is no longer the end of this process.
void outlive_launcher();

// Called on the launcher's thread with the global rank of a process that ended, and how
// ("exit status 3", "signal 9 (Killed)"). Before one is set an end ends this process, with a line
// on stderr.
using ChildListener = std::function<void(int64_t rank, bool success, const std::string& how)>;
void set_child_listener(ChildListener listener);

bool local_ranks_run();
// Until all have ended; false where that takes longer.
bool wait_for_local_ranks(std::chrono::milliseconds limit);
void kill_local_ranks();

}  // namespace lightning
