#include "lightning/data/loader_pass.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <string>
#include <utility>

#include "lightning/data/data_loader.h"
#include "lightning/errors.h"

namespace lightning {
namespace {

using Indices = std::vector<int64_t>;

// Thrown inside a worker when its pass ends early; never leaves it.
struct Cancelled {};

std::string describe(const Indices& indices) {
  constexpr size_t kShown = 3;
  std::string shown;
  for (size_t i = 0; i < indices.size() && i < kShown; ++i) {
    shown += str(i == 0 ? "" : ", ", indices[i]);
  }
  if (indices.empty()) return "";
  if (indices.size() == 1) return str(" (sample ", shown, ")");
  if (indices.size() <= kShown) return str(" (samples ", shown, ")");
  return str(" (samples ", shown, ", ... ", indices.size(), " in all)");
}

struct Where {
  int64_t batch_idx = 0;
  int64_t worker = -1;
  int64_t num_workers = 0;
  Indices indices;
};

// Signals that the caller's own thread met while it loaded are no failure of the batch.
[[noreturn]] void throw_nested(const std::exception_ptr& cause, const Where& where) {
  const std::string worker =
      where.worker < 0 ? "" : str(" in worker ", where.worker, " of ", where.num_workers);
  const auto fail = [&](const std::string& what) {
    std::throw_with_nested(
        DataLoaderError(str("Loading batch ", where.batch_idx, describe(where.indices), " failed",
                            worker, ": ", what),
                        where.worker, where.batch_idx));
  };
  try {
    std::rethrow_exception(cause);
  } catch (const KeyboardInterrupt&) {
    throw;
  } catch (const SIGTERMException&) {
    throw;
  } catch (const c10::Error& error) {
    fail(error.what_without_backtrace());
  } catch (const std::exception& error) {
    fail(error.what());
  } catch (...) {
    fail("the data set threw what is no std::exception.");
  }
  throw;  // not reached
}

// Waits until `ready()`, looking up now and then. Errors: DataLoaderError after `timeout_s`.
template <class Ready>
void wait_for_worker(std::condition_variable& changed, std::unique_lock<std::mutex>& lock,
                     double timeout_s, int64_t batch_idx, Ready ready) {
  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  while (!ready()) {
    changed.wait_for(lock, std::chrono::milliseconds(50));
    if (ready()) return;
    lock.unlock();
    check_while_waiting();
    lock.lock();
    const std::chrono::duration<double> waited = Clock::now() - begin;
    if (timeout_s > 0 && waited.count() > timeout_s && !ready()) {
      throw DataLoaderError(str("Batch ", batch_idx, " did not come within timeout_s ", timeout_s,
                                ". Give the loader more time or more workers, or look what the "
                                "data set waits for."),
                            -1, batch_idx);
    }
  }
}

Batch finish(const LoadPlan& plan, Batch batch) {
  return plan.pin_memory ? batch.pin_memory() : batch;
}

Batch load(const LoadPlan& plan, Dataset& dataset, const Indices& indices,
           const std::atomic<bool>& cancelled) {
  if (!plan.batch_size) return finish(plan, dataset.get(indices.at(0)));
  if (!plan.collate_fn) {
    if (auto batch = dataset.get_batch(indices)) return finish(plan, std::move(*batch));
  }
  std::vector<Batch> samples;
  samples.reserve(indices.size());
  for (int64_t index : indices) {
    if (cancelled.load(std::memory_order_relaxed)) throw Cancelled();
    samples.push_back(dataset.get(index));
  }
  return finish(plan,
                plan.collate_fn ? plan.collate_fn(std::move(samples)) : default_collate(samples));
}

std::optional<Batch> load(const LoadPlan& plan, Stream& stream,
                          const std::atomic<bool>& cancelled) {
  std::optional<Batch> batch;
  if (!plan.batch_size) {
    batch = stream.next();
  } else if (!plan.collate_fn) {
    batch = stream.next_batch(*plan.batch_size);
    if (batch && plan.drop_last && batch->batch_size().value_or(0) < *plan.batch_size) {
      return std::nullopt;
    }
  } else {
    std::vector<Batch> samples;
    while (static_cast<int64_t>(samples.size()) < *plan.batch_size) {
      if (cancelled.load(std::memory_order_relaxed)) throw Cancelled();
      auto sample = stream.next();
      if (!sample) break;
      samples.push_back(std::move(*sample));
    }
    const bool complete = static_cast<int64_t>(samples.size()) == *plan.batch_size;
    if (samples.empty() || (plan.drop_last && !complete)) return std::nullopt;
    batch = plan.collate_fn(std::move(samples));
  }
  if (batch) batch = finish(plan, std::move(*batch));
  return batch;
}

void initialize(const LoadPlan& plan, LoadWorkers& workers, int64_t id) {
  if (workers.initialized[id] || !plan.worker_init_fn) return;
  plan.worker_init_fn(id);
  workers.initialized[id] = true;
}

// ---- Map-style ----------------------------------------------------------------------------------

// The batches of indices still to come, with the place they have in the pass.
class IndexSource {
 public:
  IndexSource(const LoadPlan& plan, LoadPlace& place)
      : sampler_(*plan.batch_sampler), size_(plan.dataset->size()), place_(place) {}

  bool next(Indices& indices) {
    if (!stream_) begin();
    if (!stream_(indices)) return false;
    for (int64_t index : indices) {
      if (index >= 0 && index < size_) continue;
      throw MisconfigurationError(str("The sampler gave index ", index, " for a data set of ",
                                      size_, " samples, expected 0 to ", size_ - 1, "."));
    }
    return true;
  }

  void begin() {
    if (place_.restored && !place_.order.empty()) sampler_.load_state_dict(place_.order);
    stream_ = sampler_.iterate();
    place_.order = sampler_.state_dict();
    Indices skipped;
    for (int64_t batch = 0; batch < place_.batches && stream_(skipped); ++batch) {
    }
  }

 private:
  BatchSamplerBase& sampler_;
  int64_t size_;
  LoadPlace& place_;
  BatchIndexStream stream_;
};

// Common to both map-style passes: what was given, and where that leaves the pass.
class MapPass : public LoaderIterator {
 public:
  MapPass(LoadPlan plan, std::shared_ptr<LoadPlace> place)
      : plan_(std::move(plan)),
        place_(std::move(place)),
        total_(plan_.batch_sampler->size()),
        source_(plan_, *place_) {}

  std::vector<int64_t> last_indices() const override { return indices_; }

 protected:
  void count_batch() {
    ++place_->batches;
    if (total_ && place_->batches >= *total_) place_->finished = true;
  }
  std::optional<Batch> end() {
    place_->finished = true;
    indices_.clear();
    return std::nullopt;
  }
  uint64_t batch_seed(int64_t batch_idx) const {
    return mix_seed(place_->base_seed, static_cast<uint64_t>(batch_idx));
  }

  const LoadPlan plan_;
  const std::shared_ptr<LoadPlace> place_;
  const std::optional<int64_t> total_;
  IndexSource source_;
  Indices indices_;  // of the last batch
};

// Loads in the caller's thread.
class DirectMapPass : public MapPass {
 public:
  using MapPass::MapPass;

  std::optional<Batch> next() override {
    if (ended_ || !source_.next(indices_)) {
      ended_ = true;
      return end();
    }
    const int64_t batch_idx = place_->batches;
    count_batch();
    const LoadingScope scope(batch_seed(batch_idx));
    try {
      return load(plan_, *plan_.dataset, indices_, never_);
    } catch (...) {
      throw_nested(std::current_exception(), {batch_idx, -1, 0, indices_});
    }
  }

 private:
  bool ended_ = false;
  const std::atomic<bool> never_{false};
};

// A ring of batches in flight. The caller's thread draws indices and hands batches out in order;
// workers take what was drawn, whoever is free. A slot belongs to the caller while it is neither
// queued nor taken, to a worker from taking to done.
class ThreadedMapPass : public MapPass {
 public:
  ThreadedMapPass(LoadPlan plan, std::shared_ptr<LoadPlace> place,
                  std::shared_ptr<LoadWorkers> workers)
      : MapPass(std::move(plan), std::move(place)),
        workers_(std::move(workers)),
        slots_(static_cast<size_t>(plan_.num_workers * plan_.prefetch_factor)),
        queued_(place_->batches),
        loadable_(place_->batches),
        taken_(place_->batches),
        given_(place_->batches) {
    source_.begin();
    queue_ahead();
    workers_->pool.start([this](const WorkerInfo& worker) { work(worker); }, place_->base_seed);
  }

  ~ThreadedMapPass() override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      cancelled_ = true;
    }
    to_load_.notify_all();
    workers_->pool.wait();
  }

  std::optional<Batch> next() override {
    if (given_ == queued_) return end();
    Slot& slot = slots_[given_ % slots_.size()];
    {
      std::unique_lock<std::mutex> lock(mutex_);
      waiting_for_ = given_;
      wait_for_worker(loaded_, lock, plan_.timeout_s, given_, [&] { return slot.done; });
    }
    // All of it before queue_ahead() gives the slot away.
    const int64_t batch_idx = given_++;
    const int64_t worker = slot.worker;
    std::swap(indices_, slot.indices);
    const auto error = std::exchange(slot.error, nullptr);
    const bool by_sampler = std::exchange(slot.by_sampler, false);
    std::optional<Batch> batch = std::exchange(slot.batch, Batch());
    slot.done = false;
    queue_ahead();
    if (by_sampler) std::rethrow_exception(error);
    count_batch();
    if (error) throw_nested(error, {batch_idx, worker, plan_.num_workers, indices_});
    return batch;
  }

 private:
  struct Slot {
    Indices indices;
    Batch batch;
    std::exception_ptr error;
    bool by_sampler = false;  // the error is the sampler's, and ends the pass
    bool done = false;
    int64_t worker = -1;
  };

  // Draws indices into the free slots. What a sampler throws comes out in its turn.
  void queue_ahead() {
    int64_t queued = queued_, loadable = queued_;
    while (!drawn_ && queued - given_ < static_cast<int64_t>(slots_.size())) {
      Slot& slot = slots_[queued % slots_.size()];
      try {
        drawn_ = !source_.next(slot.indices);
      } catch (...) {
        slot.error = std::current_exception();
        slot.by_sampler = slot.done = drawn_ = true;
        ++queued;
      }
      if (!drawn_) loadable = ++queued;
    }
    if (queued == queued_) return;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      queued_ = queued;
      loadable_ = loadable;
    }
    to_load_.notify_all();
  }

  void work(const WorkerInfo& worker) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      to_load_.wait(lock, [&] { return cancelled_ || taken_ < loadable_; });
      if (cancelled_) return;
      const int64_t batch_idx = taken_++;
      Slot& slot = slots_[batch_idx % slots_.size()];
      lock.unlock();
      slot.worker = worker.id;
      try {
        initialize(plan_, *workers_, worker.id);
        const LoadingScope scope(batch_seed(batch_idx));
        slot.batch = load(plan_, *workers_->datasets[worker.id], slot.indices, cancelled_);
      } catch (const Cancelled&) {
        return;
      } catch (...) {
        slot.error = std::current_exception();
      }
      lock.lock();
      slot.done = true;
      if (waiting_for_ == batch_idx) loaded_.notify_one();
    }
  }

  const std::shared_ptr<LoadWorkers> workers_;
  std::vector<Slot> slots_;
  std::mutex mutex_;
  std::condition_variable to_load_;
  std::condition_variable loaded_;
  std::atomic<bool> cancelled_{false};
  bool drawn_ = false;  // the sampler has ended
  // Numbers of batches in the pass: taken <= loadable <= queued, given <= queued.
  int64_t queued_;
  int64_t loadable_;  // without the one that is the sampler's error
  int64_t taken_;
  int64_t given_;
  int64_t waiting_for_ = -1;
};

// ---- Streams ------------------------------------------------------------------------------------

// Lanes are the workers' streams (one where the caller loads). Batches come from each in turn, and
// lanes that have ended are passed over, so the order depends on no timing.
class StreamPass : public LoaderIterator {
 public:
  StreamPass(LoadPlan plan, std::shared_ptr<LoadPlace> place)
      : plan_(std::move(plan)),
        place_(std::move(place)),
        lanes_(static_cast<size_t>(std::max<int64_t>(plan_.num_workers, 1))) {
    plan_.stream->reset();
    place_->lanes.resize(lanes_.size());
    for (size_t id = 0; id < lanes_.size(); ++id) {
      const auto number = static_cast<int64_t>(id);
      lanes_[id].stream =
          plan_.stream->open({number, static_cast<int64_t>(lanes_.size()), place_->base_seed + id});
      lanes_[id].batches = place_->lanes[id].batches;
      if (place_->restored && !place_->lanes[id].ended) {
        lanes_[id].stream->load_state_dict(place_->lanes[id].state);
      }
    }
  }

  std::optional<Batch> next() override {
    for (;;) {
      const auto id = next_lane();
      if (!id) return std::nullopt;
      Ready ready = take(*id);
      LoadPlace::Lane& lane = place_->lanes[*id];
      lane.ended = !ready.batch;
      if (!ready.batch && !ready.error) continue;
      lane.state = std::move(ready.state);
      ++lane.batches;
      const int64_t batch_idx = place_->batches++;
      place_->cursor = static_cast<int64_t>((*id + 1) % lanes_.size());
      if (ready.error) {
        throw_nested(ready.error, {batch_idx,
                                   plan_.num_workers > 0 ? static_cast<int64_t>(*id) : -1,
                                   plan_.num_workers,
                                   {}});
      }
      return std::move(ready.batch);
    }
  }

 protected:
  struct Ready {
    std::optional<Batch> batch;  // none: the end, or an error, which ends the lane too
    std::exception_ptr error;
    State state;  // behind the batch
  };
  struct Lane {
    std::unique_ptr<Stream> stream;
    int64_t batches = 0;  // read
    std::deque<Ready> ready;
  };

  virtual Ready take(size_t id) { return read(id, never_); }

  Ready read(size_t id, const std::atomic<bool>& cancelled) {
    Lane& lane = lanes_[id];
    Ready ready;
    const LoadingScope scope(mix_seed(place_->base_seed, id, static_cast<uint64_t>(lane.batches)));
    try {
      ready.batch = load(plan_, *lane.stream, cancelled);
      if (ready.batch && plan_.stream->is_stateful()) ready.state = lane.stream->state_dict();
    } catch (const Cancelled&) {
      throw;
    } catch (...) {
      ready.batch.reset();
      ready.error = std::current_exception();
    }
    ++lane.batches;
    return ready;
  }

  const LoadPlan plan_;
  const std::shared_ptr<LoadPlace> place_;
  std::vector<Lane> lanes_;

 private:
  std::optional<size_t> next_lane() {
    for (size_t i = 0; i < lanes_.size(); ++i) {
      const size_t id = (static_cast<size_t>(place_->cursor) + i) % lanes_.size();
      if (!place_->lanes[id].ended) return id;
    }
    place_->finished = true;
    return std::nullopt;
  }

  const std::atomic<bool> never_{false};
};

class ThreadedStreamPass : public StreamPass {
 public:
  ThreadedStreamPass(LoadPlan plan, std::shared_ptr<LoadPlace> place,
                     std::shared_ptr<LoadWorkers> workers)
      : StreamPass(std::move(plan), std::move(place)), workers_(std::move(workers)) {
    std::vector<char> ended;
    for (const auto& lane : place_->lanes) ended.push_back(lane.ended);
    workers_->pool.start(
        [this, ended](const WorkerInfo& worker) {
          if (!ended[static_cast<size_t>(worker.id)]) work(worker);
        },
        place_->base_seed);
  }

  ~ThreadedStreamPass() override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      cancelled_ = true;
    }
    room_.notify_all();
    workers_->pool.wait();
  }

 protected:
  Ready take(size_t id) override {
    auto& queue = lanes_[id].ready;
    std::unique_lock<std::mutex> lock(mutex_);
    wait_for_worker(loaded_, lock, plan_.timeout_s, place_->batches,
                    [&] { return !queue.empty(); });
    Ready ready = std::move(queue.front());
    queue.pop_front();
    lock.unlock();
    room_.notify_all();
    return ready;
  }

 private:
  void work(const WorkerInfo& worker) {
    const auto id = static_cast<size_t>(worker.id);
    auto& queue = lanes_[id].ready;
    for (bool ended = false; !ended;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        room_.wait(lock, [&] {
          return cancelled_ || static_cast<int64_t>(queue.size()) < plan_.prefetch_factor;
        });
        if (cancelled_) return;
      }
      Ready ready;
      try {
        initialize(plan_, *workers_, worker.id);
        ready = read(id, cancelled_);
      } catch (const Cancelled&) {
        return;
      } catch (...) {
        ready.error = std::current_exception();
      }
      ended = !ready.batch;
      const std::lock_guard<std::mutex> lock(mutex_);
      queue.push_back(std::move(ready));
      loaded_.notify_one();
    }
  }

  const std::shared_ptr<LoadWorkers> workers_;
  std::mutex mutex_;
  std::condition_variable room_;
  std::condition_variable loaded_;
  std::atomic<bool> cancelled_{false};
};

}  // namespace

LoadWorkers::LoadWorkers(const LoadPlan& plan)
    : initialized(static_cast<size_t>(plan.num_workers)), pool(plan.num_workers) {
  for (int64_t id = 0; plan.dataset != nullptr && id < plan.num_workers; ++id) {
    auto own = plan.dataset->for_worker();
    datasets.push_back(own != nullptr ? std::move(own) : plan.dataset);
  }
}

std::unique_ptr<LoaderIterator> begin_pass(LoadPlan plan, std::shared_ptr<LoadPlace> place,
                                           std::shared_ptr<LoadWorkers> workers) {
  if (plan.dataset != nullptr) {
    if (workers == nullptr) {
      return std::make_unique<DirectMapPass>(std::move(plan), std::move(place));
    }
    return std::make_unique<ThreadedMapPass>(std::move(plan), std::move(place), std::move(workers));
  }
  if (workers == nullptr) {
    return std::make_unique<StreamPass>(std::move(plan), std::move(place));
  }
  return std::make_unique<ThreadedStreamPass>(std::move(plan), std::move(place),
                                              std::move(workers));
}

}  // namespace lightning
