// Saves checkpoints in the background while training goes on.
//
// Registered as "AsyncCheckpointIO": plugins: [AsyncCheckpointIO]. save() copies the state (on a
// GPU the copy goes on beside training, see snapshot.h) and returns; a thread writes it. One save
// is under way at most: the next waits for it. Links and removals come after the saves before them,
// and are left out where such a save failed, so that the checkpoint before it stays.
//
// An error of the background is thrown once, by the check() of the next batch, by the next save()
// (which is made nevertheless), or by teardown(). A program that ends by exit() or returns from
// main() waits for the save; one that is killed leaves the file before it, never half of one.
// Called by one thread. A process made by fork() has no part in the saves of its parent.
// Source: Lightning 2.6, `AsyncCheckpointIO`.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "lightning/checkpoint/checkpoint_io.h"
#include "lightning/checkpoint/snapshot.h"
#include "lightning/registry.h"

namespace lightning {

struct AsyncCheckpointIOOptions : Options<AsyncCheckpointIOOptions> {
  OPTION(std::optional<Part<CheckpointIO>>, checkpoint_io, std::nullopt,
         "What writes the files. Where not given: that of a Trainer without this plugin.");
};

class AsyncCheckpointIO : public CheckpointIO {
 public:
  // `io` null: default_checkpoint_io().
  explicit AsyncCheckpointIO(std::shared_ptr<CheckpointIO> io = nullptr);
  explicit AsyncCheckpointIO(const AsyncCheckpointIOOptions& options);
  // Waits. An error that nobody was told of becomes a warning.
  ~AsyncCheckpointIO() override;

  void save(const State& checkpoint, const std::string& path) override;
  // A save of which each process of a run does a part. `plan` gets the copy, whose values may not
  // be there yet, on the calling thread, where collectives are in order; the thread runs what it
  // gives once they are. That is to fail on all processes or on none: check() does not throw its
  // error, as processes would get there at different batches; the next save, or teardown(), does.
  using Plan = std::function<std::function<void()>(State copy)>;
  void save_together(const State& checkpoint, const std::string& path, const Plan& plan);
  State load(const std::string& path) override;
  void remove(const std::string& path) override;
  void link(const std::string& target, const std::string& place) override;
  void check() override;
  void teardown() override;
  // Returns when nothing is under way. Errors are told by the others.
  void wait();

  CheckpointIO& wrapped() const { return *io_; }
  // How long the last save() kept its caller, the wait for the save before it included.
  double last_stall_seconds() const { return last_stall_seconds_; }
  // Whether a file will be at this path once all that was asked for is done; nullopt where nothing
  // is under way that says so.
  std::optional<bool> will_exist(const std::string& path) const;

 private:
  enum class Kind { kSave, kLink, kRemove };
  struct Task {
    Kind kind;
    std::string path;
    std::function<void()> run;
    bool together = false;
  };

  void start();
  void stop();
  bool of_this_process() const;
  // Runs it now where nothing is under way, else behind that.
  void in_order(Task task);
  void work();
  static std::exception_ptr attempt(const Task& task);
  void note(std::exception_ptr error, bool together);
  void save(const State& checkpoint, const std::string& path, const Plan& plan, bool together);
  void rethrow();
  static void wait_at_exit();

  std::shared_ptr<CheckpointIO> io_;
  Snapshot snapshot_;
  double last_stall_seconds_ = 0;

  std::thread thread_;
  int process_ = 0;  // that started the thread; 0: none runs
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Task> tasks_;  // the first is under way
  bool ending_ = false;
  bool save_failed_ = false;  // the last one
  std::exception_ptr error_;
  std::atomic<bool> has_error_{false};  // one for check()
};

}  // namespace lightning
