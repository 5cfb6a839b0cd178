// Several loaders as one.
//
//   min_size         stops when the first loader ends
//   max_size_cycle   stops when each has ended at least once; shorter ones start again
//   max_size         stops when all have ended; shorter ones then give none
//   sequential       one after another
//
// In the first three, an item holds a batch of each loader, in the structure in which the loaders
// were given. Source: Lightning 2.6, `CombinedLoader`.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "lightning/batch.h"
#include "lightning/checkpoint/state.h"
#include "lightning/data/loader.h"

namespace lightning {

class CombinedIterator {
 public:
  struct Item {
    Batch batch;
    int64_t batch_idx = 0;       // from 0; in sequential mode within its loader
    int64_t dataloader_idx = 0;  // of a flattened loader; 0 but in sequential mode
  };

  ~CombinedIterator();
  CombinedIterator(const CombinedIterator&) = delete;
  CombinedIterator& operator=(const CombinedIterator&) = delete;

  std::optional<Item> next();

  // Is there nothing after the item that next() gave last? Where the length is known the answer
  // costs nothing; else the next item is fetched now and kept for next().
  bool done();

  // Items of the whole pass, with limits; nullopt when not known.
  std::optional<int64_t> length() const;

  // Of the samples of the last item's batch, in sequential mode or of a lone loader.
  std::vector<int64_t> last_indices() const;

  struct Impl;

 private:
  friend class CombinedLoader;
  explicit CombinedIterator(std::unique_ptr<Impl> impl);

  std::unique_ptr<Impl> impl_;
};

class CombinedLoader : public Loader {
 public:
  // Errors: MisconfigurationError for a mode that is not one of the four.
  explicit CombinedLoader(Loaders loaders, std::string mode = "min_size");

  // All loaders begin, and their workers with them; in sequential mode each when it is reached.
  //   first   items of this pass that were done before, for a loader whose state was loaded in the
  //           middle of an epoch: counts go on from there, and loaders that had ended stay so
  std::unique_ptr<CombinedIterator> iterate_items(int64_t first = 0);
  std::unique_ptr<LoaderIterator> iterate() override;

  // The most batches that are taken of each loader: one number for all, or one each. A sequential
  // pass goes on to the next loader there; the other modes end at length().
  // Errors: MisconfigurationError for a wrong number of limits, or one below zero.
  void set_limit(int64_t limit);
  void set_limits(std::vector<int64_t> limits);
  void clear_limits();
  const std::vector<int64_t>& limits() const { return limits_; }  // empty: none

  // Items in one pass, with limits; nullopt when not known. (Known before iterate(), where Python
  // wants iter() first.)
  std::optional<int64_t> size() const override;
  void set_epoch(int64_t epoch) override;

  // A CombinedLoader of the loaders' own answers, keeping a loader that gave none; null if none
  // did.
  std::shared_ptr<Loader> sequential() const override;
  std::shared_ptr<Loader> for_predict() const override;
  std::shared_ptr<Loader> distributed(const SamplerArguments& share, bool shuffle) const override;
  bool shuffles() const override;        // any
  int64_t num_workers() const override;  // the fewest of all

  // A list of the states of the loaders that have one, in flattened order, as of the last item that
  // next() gave.
  // Errors: CheckpointError where the number of states is not that of the stateful loaders.
  bool is_stateful() const override;
  State state_dict() const override;
  void load_state_dict(const State& state) override;
  // None where a loader had started again or ended, and in sequential mode with several.
  State one_batch_earlier(State state) const override;
  State after_pass(State state) const override;

  const std::string& mode() const { return mode_; }
  const Loaders& loaders() const { return loaders_; }
  std::vector<std::shared_ptr<Loader>> flattened() const { return loaders_.flatten(); }
  // Errors: MisconfigurationError for another number of loaders.
  void set_flattened(const std::vector<std::shared_ptr<Loader>>& loaders);

 private:
  Loaders loaders_;
  std::string mode_;
  std::vector<int64_t> limits_;
  // The loaders' states before an item that the iterator fetched ahead; the iterator holds them.
  std::weak_ptr<std::optional<State>> state_before_;
};

}  // namespace lightning
