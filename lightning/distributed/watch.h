// The processes of a run watch each other, so that the end of one ends all within seconds: a
// collective would wait for it for half an hour.
//
// Each holds a connection to rank 0, through which the kernel tells of a death at once, and of a
// host that is gone after six seconds. A rank that raises tells why. Rank 0 hears what others have
// to say soon after (a broken collective is mostly the consequence), names the cause, and all end.
// Where every rank raises, none is held up and none is ended: each throws its own error.
//
// A thread of its own does this; methods may be called from any thread.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "lightning/distributed/cluster_environment.h"
#include "lightning/scope.h"

namespace lightning {

// A signal that asks for the end of a run.
enum class Stop : uint8_t { kNo, kTerminate, kInterrupt };

class Watch {
 public:
  // Rank 0's. It listens on a port of its own choice.
  //   this_machine_only   whether only processes of this machine can connect
  // Errors: std::runtime_error with the system's reason.
  static Watch& host(const ProcessPlace& place, bool this_machine_only);
  // Another rank's: connects to rank 0. `meeting_point` is what rank 0's gave.
  static Watch& join(const ProcessPlace& place, const std::string& address,
                     const std::string& meeting_point);
  // Null where this process is alone, or has not joined yet.
  static Watch* current();

  // Port and a secret that admits to it.
  std::string meeting_point() const;
  // The address of this host as other nodes see it. Rank 0 waits for one of another node.
  std::string own_address();

  // While alive this process is in a run, which needs all others; `trains`: and stops where all do.
  // Errors: std::runtime_error where one has ended its program already.
  Scope in_run(bool trains);

  bool trains() const;
  // At a place to which all ranks come equally often: whether they stop here, because one of them
  // was asked to. A rank that is asked goes on until all have agreed where: no message is sent and
  // nothing waited for before.
  Stop stop_here(Stop asked);

  // Tells all ranks that this one raises, and waits until the cause is agreed on. Returns where
  // the error may go on its way: true where all ranks raise, false where the others are ended and
  // this one has some seconds left to clean up. Another rank's error ends this process in here.
  bool report(const std::string& error);

  // When the program ends, at the latest what is destroyed after main. May end the process with
  // another status.
  //   once_told   called when the others have been told that this one has left, and before it waits
  //               for those that it started
  void leave(int status, const std::function<void()>& once_told);

  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

 private:
  struct Impl;
  explicit Watch(std::unique_ptr<Impl> impl);
  ~Watch();  // never: its thread runs as long as the process

  static Watch& install(std::unique_ptr<Impl> impl);

  std::unique_ptr<Impl> impl_;
};

// Watch::report for whoever does not know whether there is one; true where there is none.
bool report_failure(const std::string& error);

}  // namespace lightning
