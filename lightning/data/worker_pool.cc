#include "lightning/data/worker_pool.h"

#include <ATen/Parallel.h>
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>

#include <system_error>
#include <utility>

#include "lightning/errors.h"

namespace lightning {
namespace {

// at::set_num_threads would change the number for the whole program. OpenMP's and MKL's own setters
// hold for the calling thread; they are looked up in the libraries that LibTorch has loaded,
// because linking an OpenMP of ours would bring in a second one.
void use_one_thread_for_operators() {
  at::get_num_threads();  // LibTorch sets its number on a thread's first use: before ours
  if (auto* set = reinterpret_cast<void (*)(int)>(dlsym(RTLD_DEFAULT, "omp_set_num_threads"))) {
    set(1);
  }
  using SetLocal = int (*)(int);
  if (auto* set = reinterpret_cast<SetLocal>(dlsym(RTLD_DEFAULT, "MKL_Set_Num_Threads_Local"))) {
    set(1);
  }
}

// While it lives, threads started here are born with all signals blocked.
class BlockedSignals {
 public:
  BlockedSignals() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~BlockedSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

}  // namespace

WorkerPool::WorkerPool(int64_t num_workers) {
  const BlockedSignals blocked;
  try {
    for (int64_t id = 0; id < num_workers; ++id) {
      threads_.emplace_back([this, id] { run(id); });
      pthread_setname_np(threads_.back().native_handle(), str("data-", id).substr(0, 15).c_str());
    }
  } catch (const std::system_error& error) {
    const size_t started = threads_.size();
    end();
    throw MisconfigurationError(str("A DataLoader with num_workers ", num_workers,
                                    " could start only ", started, " threads (", error.what(),
                                    "). Use fewer workers."));
  }
}

WorkerPool::~WorkerPool() { end(); }

void WorkerPool::end() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ending_ = true;
  }
  begin_.notify_all();
  for (auto& thread : threads_) thread.join();
  threads_.clear();
}

void WorkerPool::start(Job job, uint64_t seed) {
  wait();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    job_ = std::move(job);
    seed_ = seed;
    running_ = size();
    ++jobs_;
  }
  begin_.notify_all();
}

void WorkerPool::wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  done_.wait(lock, [&] { return running_ == 0; });
  job_ = nullptr;
}

void WorkerPool::run(int64_t id) {
  use_one_thread_for_operators();
  std::unique_lock<std::mutex> lock(mutex_);
  for (int64_t job = 1;; ++job) {
    begin_.wait(lock, [&] { return ending_ || jobs_ >= job; });
    if (jobs_ < job) return;
    const WorkerInfo info{id, static_cast<int64_t>(threads_.size()),
                          seed_ + static_cast<uint64_t>(id)};
    set_worker_info(&info);
    lock.unlock();
    job_(info);
    lock.lock();
    set_worker_info(nullptr);
    if (--running_ == 0) done_.notify_all();
  }
}

}  // namespace lightning
