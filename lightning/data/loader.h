// What a loop iterates. `DataLoader` and `CombinedLoader` are the loaders of this framework; any
// other source of batches derives from `Loader`.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "lightning/batch.h"
#include "lightning/checkpoint/state.h"
#include "lightning/distributed/collectives.h"

namespace lightning {

// One pass over the data. Destroying it ends its workers.
class LoaderIterator {
 public:
  virtual ~LoaderIterator() = default;

  // The next batch, or nullopt at the end. An exception of a worker reaches the caller here.
  virtual std::optional<Batch> next() = 0;

  // The places in the data set of the samples of the batch that next() gave last; empty where the
  // loader does not know them. For prediction writers.
  virtual std::vector<int64_t> last_indices() const { return {}; }
};

// A next() that waits for a worker calls this check some twenty times a second; what it throws
// leaves next(). Whoever handles signals sets it (KeyboardInterrupt) and sets it back to null.
using WaitCheck = void (*)();
WaitCheck set_wait_check(WaitCheck check);  // returns the one before
void check_while_waiting();                 // for loaders

class Loader {
 public:
  virtual ~Loader() = default;

  virtual std::unique_ptr<LoaderIterator> iterate() = 0;
  // Batches in one pass; nullopt when not known (streams).
  virtual std::optional<int64_t> size() const { return std::nullopt; }
  // Called before each training epoch: the seed of this epoch's order.
  virtual void set_epoch(int64_t /*epoch*/) {}

  // What the loop wants of a loader that draws from a map-style data set. Each gives the loader to
  // use instead, or null where it does not apply.
  //   sequential   the same data in order, for overfit_batches
  //   for_predict  every sample once, also the last incomplete batch, noting their indices
  //   distributed  this rank's share
  virtual std::shared_ptr<Loader> sequential() const { return nullptr; }
  virtual std::shared_ptr<Loader> for_predict() const { return nullptr; }
  virtual std::shared_ptr<Loader> distributed(const SamplerArguments&, bool /*shuffle*/) const {
    return nullptr;
  }
  virtual bool shuffles() const { return false; }
  virtual int64_t num_workers() const { return 0; }

  // The place in the data, for exact resume; None where the loader keeps none.
  virtual bool is_stateful() const { return false; }
  virtual State state_dict() const { return {}; }
  virtual void load_state_dict(const State&) {}
  // `state`, one of this loader's, as it was a batch earlier, for a batch that has to be done
  // again; None where that cannot be told.
  virtual State one_batch_earlier(State /*state*/) const { return {}; }
  // `state` as if its pass were complete: the next one begins anew.
  virtual State after_pass(State state) const { return state; }
};

// The loaders of one stage: none, one, a list, or a map; lists and maps nest. A `CombinedLoader`
// given as the only loader decides itself how its parts are combined.
class Loaders {
 public:
  Loaders() = default;
  template <class L, std::enable_if_t<std::is_base_of<Loader, L>::value, int> = 0>
  Loaders(std::shared_ptr<L> loader) : loader_(std::move(loader)) {}
  template <class L, std::enable_if_t<std::is_base_of<Loader, std::decay_t<L>>::value, int> = 0>
  Loaders(L&& loader) : loader_(std::make_shared<std::decay_t<L>>(std::forward<L>(loader))) {}
  Loaders(std::vector<Loaders> items) : is_list_(true), items_(named(std::move(items))) {}
  static Loaders map(std::vector<std::pair<std::string, Loaders>> items) {
    Loaders loaders;
    loaders.is_map_ = true;
    loaders.items_ = std::move(items);
    return loaders;
  }

  bool empty() const { return loader_ == nullptr && !is_list_ && !is_map_; }
  const std::shared_ptr<Loader>& single() const { return loader_; }  // null for a list or map
  bool is_list() const { return is_list_; }
  bool is_map() const { return is_map_; }
  const std::vector<std::pair<std::string, Loaders>>& items() const { return items_; }

  // The leaves in order.
  std::vector<std::shared_ptr<Loader>> flatten() const;
  // The same shape with the leaves replaced, in the same order.
  Loaders with_leaves(const std::vector<std::shared_ptr<Loader>>& leaves) const;
  // A batch of the same shape from one item for each leaf (a lone loader: that item).
  Batch unflatten(const std::vector<Batch>& leaves) const;

 private:
  static std::vector<std::pair<std::string, Loaders>> named(std::vector<Loaders> items);

  bool is_list_ = false;
  bool is_map_ = false;
  std::shared_ptr<Loader> loader_;
  std::vector<std::pair<std::string, Loaders>> items_;
};

}  // namespace lightning
