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
#include "lightning/distributed/collectives.h"
#include "lightning/scope.h"

namespace lightning {

// What the ranks of a run decide together, when one of them asks to.
enum class Matter : uint8_t { kStop, kSignals, kValidation };

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
  // All ranks begin the same runs.
  // Errors: std::runtime_error where one has ended its program already.
  Scope in_run(bool trains);

  bool trains() const;
  // At a place of a matter, to which all ranks come equally often: whether all meet here, because
  // one of them asked to, here or before. It is the first place that none had passed: where all ask
  // at the same one, that. All then call a collective before the next place.
  //
  // Until a rank asks no message is sent and nothing waited for. Who asks waits for the threads of
  // the others to say where they are, whatever the others wait for meanwhile.
  bool meet_here(Matter matter, bool asks);
  // What the other ranks do, as "rank 1 has waited in `backward` for 3 s"; may take two seconds.
  // Empty where they are not heard of.
  std::string where_others_are();

  // A signal asks this process to end, which it does between batches; 0: no more. A rank that waits
  // for others which do not come (whereabouts.h) would never get there: then all end, with 128 and
  // the signal. For handlers too.
  static void on_stop_signal(int number);
  static int stop_signal();

  const ProcessPlace& place() const;
  // How many ranks have joined, as rank 0 knows.
  int64_t joined() const;
  // How many messages this process has sent.
  int64_t messages() const;

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
// Watch::meet_here for a process of `ranks`: who is alone meets where it asks to, and ranks that do
// not watch each other meet at every place.
bool meet_here(const Collectives& ranks, Matter matter, bool asks);

}  // namespace lightning
