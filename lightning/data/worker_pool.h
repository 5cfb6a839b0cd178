// The threads of a loader. They run one job after another, all of them the same one.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "lightning/data/worker.h"

namespace lightning {

// Operators run on one thread inside a worker, so that workers do not fight over the cores. Signals
// are left to the program's own threads.
class WorkerPool {
 public:
  using Job = std::function<void(const WorkerInfo& worker)>;

  explicit WorkerPool(int64_t num_workers);
  // Waits for the job, then joins all threads: tell the job to end first.
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  // Begins `job` on every thread. The job lets no exception out. One job at a time: see wait().
  //   seed   WorkerInfo::seed of worker 0; that of the others follows
  void start(Job job, uint64_t seed);
  // Returns when every thread has come back from its job.
  void wait();

  int64_t size() const { return static_cast<int64_t>(threads_.size()); }

 private:
  void run(int64_t id);
  void end();

  std::mutex mutex_;
  std::condition_variable begin_;
  std::condition_variable done_;
  Job job_;
  uint64_t seed_ = 0;
  int64_t jobs_ = 0;     // begun so far
  int64_t running_ = 0;  // threads inside the job
  bool ending_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace lightning
