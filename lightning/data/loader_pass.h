// One pass of a DataLoader: the iterators behind `DataLoader::iterate`. Applications use
// `data_loader.h`.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "lightning/data/dataset.h"
#include "lightning/data/loader.h"
#include "lightning/data/sampler.h"
#include "lightning/data/worker_pool.h"

namespace lightning {

// What a pass loads and how.
struct LoadPlan {
  std::shared_ptr<Dataset> dataset;  // this or the next
  std::shared_ptr<StreamDataset> stream;
  std::shared_ptr<BatchSamplerBase> batch_sampler;  // map-style only
  std::optional<int64_t> batch_size;                // nullopt: samples as they are
  bool drop_last = false;                           // streams; a batch sampler knows itself
  CollateFunction collate_fn;                       // null: default
  std::function<void(int64_t)> worker_init_fn;
  bool pin_memory = false;
  int64_t num_workers = 0;
  int64_t prefetch_factor = 2;
  double timeout_s = 0;
};

// Where a pass stands. The loader reads it, the iterator advances it, on one thread.
struct LoadPlace {
  struct Lane {  // a worker's stream
    State state;
    int64_t batches = 0;
    bool ended = false;
  };
  int64_t epoch = 0;
  int64_t passes = 1;  // begun in this epoch, this one included
  uint64_t base_seed = 0;
  int64_t batches = 0;  // given by next()
  bool finished = false;
  bool restored = false;  // begin at `batches`, with `order` or `lanes` as they were
  State order;            // the batch sampler's
  std::vector<Lane> lanes;
  int64_t cursor = 0;  // the lane whose turn it is
};

// Threads, and what belongs to each.
struct LoadWorkers {
  explicit LoadWorkers(const LoadPlan& plan);

  std::vector<std::shared_ptr<Dataset>> datasets;  // one each; empty for streams
  std::vector<char> initialized;                   // by worker_init_fn
  WorkerPool pool;                                 // last: its threads use the above
};

//   workers   null where plan.num_workers is 0; used by no other pass that lives
std::unique_ptr<LoaderIterator> begin_pass(LoadPlan plan, std::shared_ptr<LoadPlace> place,
                                           std::shared_ptr<LoadWorkers> workers);

}  // namespace lightning
