#include "lightning/checkpoint/async_io.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <set>
#include <utility>

#include "lightning/errors.h"
#include "lightning/log.h"

namespace lightning {
namespace {

const Registration<CheckpointIO> kAsyncCheckpointIO{
    "AsyncCheckpointIO", "Saves checkpoints in the background while training goes on.",
    [](const AsyncCheckpointIOOptions& options) {
      return std::make_unique<AsyncCheckpointIO>(options);
    }};

// Those with a thread, for the end of the program. Never destroyed: it is used until the very end.
struct Running {
  std::mutex mutex;
  std::set<AsyncCheckpointIO*> all;
};

Running& running() {
  static auto* instance = new Running;
  return *instance;
}

// Paths are compared as files are.
std::string normal(const std::string& path) {
  return std::filesystem::absolute(path).lexically_normal().string();
}

std::string text_of(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& exception) {
    return exception.what();
  } catch (...) {
    return "something that is no std::exception was thrown";
  }
}

}  // namespace

AsyncCheckpointIO::AsyncCheckpointIO(std::shared_ptr<CheckpointIO> io)
    : io_(io != nullptr ? std::move(io) : default_checkpoint_io()) {
  if (dynamic_cast<AsyncCheckpointIO*>(io_.get()) != nullptr) {
    throw MisconfigurationError(
        "AsyncCheckpointIO was given an AsyncCheckpointIO to write with. Give what writes files, "
        "or "
        "nothing.");
  }
}

AsyncCheckpointIO::AsyncCheckpointIO(const AsyncCheckpointIOOptions& options)
    : AsyncCheckpointIO(options.checkpoint_io()
                            ? options.checkpoint_io()->make("AsyncCheckpointIO.checkpoint_io")
                            : nullptr) {}

AsyncCheckpointIO::~AsyncCheckpointIO() {
  if (thread_.joinable() && !of_this_process()) {
    thread_.detach();  // it is the parent's
    return;
  }
  stop();
  if (error_ != nullptr) warn("A checkpoint was not saved: " + text_of(error_));
}

// ---- What callers ask for -----------------------------------------------------------------------

void AsyncCheckpointIO::save(const State& checkpoint, const std::string& path) {
  const Plan plan = [this, &path](State copy) {
    return [this, path, copy = std::move(copy)] { io_->save(copy, path); };
  };
  save(checkpoint, path, plan, /*together=*/false);
}

void AsyncCheckpointIO::save_together(const State& checkpoint, const std::string& path,
                                      const Plan& plan) {
  save(checkpoint, path, plan, /*together=*/true);
}

void AsyncCheckpointIO::save(const State& checkpoint, const std::string& path, const Plan& plan,
                             bool together) {
  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  start();
  {
    // The copy of the state is there once: it is free when the save before is done.
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] {
      return std::none_of(tasks_.begin(), tasks_.end(),
                          [](const Task& task) { return task.kind == Kind::kSave; });
    });
  }
  auto write = plan(snapshot_.take(checkpoint));
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    tasks_.push_back({Kind::kSave, normal(path),
                      [this, write = std::move(write)] {
                        snapshot_.wait();
                        write();
                      },
                      together});
  }
  changed_.notify_all();
  last_stall_seconds_ = std::chrono::duration<double>(Clock::now() - begin).count();
  rethrow();
}

State AsyncCheckpointIO::load(const std::string& path) {
  wait();
  return io_->load(path);
}

void AsyncCheckpointIO::remove(const std::string& path) {
  in_order({Kind::kRemove, normal(path), [this, path] { io_->remove(path); }});
}

void AsyncCheckpointIO::link(const std::string& target, const std::string& place) {
  in_order({Kind::kLink, normal(place), [this, target, place] { io_->link(target, place); }});
}

void AsyncCheckpointIO::check() {
  if (has_error_.load(std::memory_order_relaxed)) rethrow();
}

void AsyncCheckpointIO::teardown() {
  stop();
  snapshot_.release();
  save_failed_ = false;
  io_->teardown();
  rethrow();
}

std::optional<bool> AsyncCheckpointIO::will_exist(const std::string& path) const {
  const auto wanted = normal(path);
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto task = tasks_.rbegin(); task != tasks_.rend(); ++task) {
    if (task->path == wanted) return task->kind != Kind::kRemove;
  }
  return std::nullopt;
}

void AsyncCheckpointIO::in_order(Task task) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!tasks_.empty()) {
      tasks_.push_back(std::move(task));
      changed_.notify_all();
      return;
    }
    if (save_failed_) return;
  }
  task.run();
}

void AsyncCheckpointIO::rethrow() {
  std::exception_ptr error;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::swap(error, error_);
    has_error_ = false;
  }
  if (error != nullptr) std::rethrow_exception(error);
}

// ---- The thread ---------------------------------------------------------------------------------

bool AsyncCheckpointIO::of_this_process() const { return process_ == ::getpid(); }

void AsyncCheckpointIO::start() {
  if (thread_.joinable() && of_this_process()) return;
  if (thread_.joinable()) {
    throw CheckpointError(
        "AsyncCheckpointIO was used by a process and by one that it made with fork(). Make one in "
        "each process.");
  }
  static const bool registered = std::atexit(&AsyncCheckpointIO::wait_at_exit) == 0;
  static_cast<void>(registered);
  {
    const std::lock_guard<std::mutex> lock(running().mutex);
    running().all.insert(this);
  }
  process_ = ::getpid();
  ending_ = false;
  thread_ = std::thread([this] { work(); });
}

void AsyncCheckpointIO::stop() {
  if (!thread_.joinable() || !of_this_process()) return;
  {
    const std::lock_guard<std::mutex> lock(running().mutex);
    running().all.erase(this);
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ending_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

// Does what is left before it ends.
void AsyncCheckpointIO::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return ending_ || !tasks_.empty(); });
    if (tasks_.empty()) return;
    const auto& task = tasks_.front();  // stays there, so that it counts as under way
    if (task.kind == Kind::kSave || !save_failed_) {
      lock.unlock();
      auto error = attempt(task);
      lock.lock();
      if (task.kind == Kind::kSave) save_failed_ = error != nullptr;
      if (error != nullptr) note(std::move(error), task.together);
    }
    {
      const auto done = std::move(tasks_.front());  // letting go of many tensors takes a while
      tasks_.pop_front();
      changed_.notify_all();
      lock.unlock();
    }
    lock.lock();
  }
}

// The first error is the one that tells what went wrong.
void AsyncCheckpointIO::note(std::exception_ptr error, bool together) {
  if (error_ != nullptr) {
    warn("Another checkpoint was not saved: " + text_of(error));
    return;
  }
  if (together) warn("A checkpoint was not saved: " + text_of(error));
  error_ = std::move(error);
  has_error_ = !together;
}

std::exception_ptr AsyncCheckpointIO::attempt(const Task& task) {
  try {
    task.run();
    return nullptr;
  } catch (...) {
    return std::current_exception();
  }
}

void AsyncCheckpointIO::wait() {
  if (!of_this_process()) return;
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return tasks_.empty(); });
}

void AsyncCheckpointIO::wait_at_exit() {
  const std::lock_guard<std::mutex> lock(running().mutex);
  for (auto* one : running().all) {
    if (!one->of_this_process()) continue;
    one->wait();
    if (one->error_ != nullptr) warn("A checkpoint was not saved: " + text_of(one->error_));
  }
}

}  // namespace lightning
