// A process that waits for the other ranks of its world to come says so, for they may never: one
// that takes its place from variables that were left in a shell would wait in silence.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "lightning/distributed/cluster_environment.h"

namespace lightning {

// How long ranks wait for one another before a run: LIGHTNING_JOIN_TIMEOUT in seconds; else 30
// minutes, or what a collective has where that is more.
// Errors: MisconfigurationError for what is no whole number.
std::chrono::milliseconds join_timeout(std::chrono::milliseconds of_collectives);

// "this is rank 0 of 2 by LOCAL_RANK=0, WORLD_SIZE=2 in the environment (LightningEnvironment)".
std::string described_place(const ProcessPlace& place, const ClusterEnvironment& environment);
// What to do where others do not come; empty where the program starts them itself.
std::string advice(const ProcessPlace& place, const ClusterEnvironment& environment);

// While alive: says once what is waited for, and ends the process when a signal asks for it, since
// there is nothing to save yet.
class JoinNotice {
 public:
  //   text   called on a thread of its own, after some seconds; empty where another rank says it
  explicit JoinNotice(std::function<std::string()> text);
  ~JoinNotice();
  JoinNotice(const JoinNotice&) = delete;
  JoinNotice& operator=(const JoinNotice&) = delete;

 private:
  struct State;
  std::shared_ptr<State> state_;
  std::thread thread_;
};

}  // namespace lightning
