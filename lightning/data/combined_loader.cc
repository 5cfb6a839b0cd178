#include "lightning/data/combined_loader.h"

#include <algorithm>
#include <exception>
#include <limits>
#include <utility>

#include "lightning/errors.h"

namespace lightning {
namespace {

using Lengths = std::vector<std::optional<int64_t>>;

constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();

const std::vector<std::string>& modes() {
  static const std::vector<std::string> names = {"min_size", "max_size_cycle", "max_size",
                                                 "sequential"};
  return names;
}

// Of one loader under its limit; nullopt when it may go on without end.
std::optional<int64_t> limited(std::optional<int64_t> length, int64_t limit) {
  if (limit == kNoLimit) return length;
  return std::min(length.value_or(kNoLimit), limit);
}

// Unknown lengths count as infinite.
std::optional<int64_t> combine(const std::string& mode, const Lengths& lengths) {
  if (lengths.empty()) return 0;
  int64_t least = kNoLimit, most = 0, sum = 0;
  bool all_known = true;
  for (const auto& length : lengths) {
    all_known = all_known && length;
    least = std::min(least, length.value_or(kNoLimit));
    most = std::max(most, length.value_or(0));
    sum += length.value_or(0);
  }
  if (mode == "min_size") return least == kNoLimit ? std::optional<int64_t>() : least;
  if (!all_known) return std::nullopt;
  return mode == "sequential" ? sum : most;
}

Lengths lengths_of(const std::vector<std::shared_ptr<Loader>>& loaders,
                   const std::vector<int64_t>& limits) {
  Lengths lengths;
  for (size_t i = 0; i < loaders.size(); ++i) {
    lengths.push_back(limited(loaders[i]->size(), limits.empty() ? kNoLimit : limits[i]));
  }
  return lengths;
}

State states_of(const std::vector<std::shared_ptr<Loader>>& loaders) {
  State::List states;
  for (const auto& loader : loaders) {
    if (loader->is_stateful()) states.push_back(loader->state_dict());
  }
  return State(std::move(states));
}

// A CombinedLoader where a plain loader is wanted: items without their counts.
class BatchesOnly : public LoaderIterator {
 public:
  explicit BatchesOnly(std::unique_ptr<CombinedIterator> items) : items_(std::move(items)) {}
  std::optional<Batch> next() override {
    auto item = items_->next();
    if (!item) return std::nullopt;
    return std::move(item->batch);
  }
  std::vector<int64_t> last_indices() const override { return items_->last_indices(); }

 private:
  std::unique_ptr<CombinedIterator> items_;
};

}  // namespace

struct CombinedIterator::Impl {
  using Fetch = std::optional<Item> (Impl::*)();

  Loaders loaders;
  std::string mode;
  std::vector<std::shared_ptr<Loader>> leaves;
  std::vector<int64_t> limits;
  Lengths lengths;  // of the leaves, with limits
  std::optional<int64_t> length;
  // What the loaders' states were before an item was fetched ahead.
  std::shared_ptr<std::optional<State>> state_before = std::make_shared<std::optional<State>>();

  std::vector<std::unique_ptr<LoaderIterator>> iterators;  // null: not begun, or ended
  std::vector<char> consumed;                              // has the loader ended at least once?
  int64_t given = 0;       // items of this pass that the caller has, those before included
  int64_t fetched = 0;     // with the one kept ahead
  size_t current = 0;      // in sequential mode: the loader
  int64_t in_current = 0;  // and what was taken of it
  std::optional<Item> ahead;
  std::exception_ptr ahead_error;  // next() throws it
  bool looked_ahead = false;       // `ahead` is the next item, or its absence the end
  std::vector<int64_t> indices, ahead_indices;
  Fetch fetch = nullptr;

  void begin(int64_t first);
  void begin_sequential(int64_t first);
  std::optional<Item> fetch_next();
  std::optional<Item> fetch_min_size();
  std::optional<Item> fetch_max_size_cycle();
  std::optional<Item> fetch_max_size();
  std::optional<Item> fetch_sequential();
  Item joined(const std::vector<Batch>& parts);
};

// Where `first` items were done before, loaders that were shorter had ended by then.
void CombinedIterator::Impl::begin(int64_t first) {
  given = fetched = first;
  const size_t count = leaves.size();
  iterators.resize(count);
  consumed.resize(count);
  if (mode == "sequential") return begin_sequential(first);
  fetch = mode == "min_size"         ? &Impl::fetch_min_size
          : mode == "max_size_cycle" ? &Impl::fetch_max_size_cycle
                                     : &Impl::fetch_max_size;
  for (size_t i = 0; i < count; ++i) {
    const auto size = leaves[i]->size();
    const bool cycles = mode == "max_size_cycle";
    const bool ended = first > 0 && size && (cycles ? first > *size : first >= *size);
    consumed[i] = ended;
    // One that is to go round begins its pass with the next item, as it would have without a pause.
    const bool at_end = cycles && first > 0 && size && *size > 0 && first % *size == 0;
    if ((!ended || cycles) && !at_end) iterators[i] = leaves[i]->iterate();
  }
}

void CombinedIterator::Impl::begin_sequential(int64_t first) {
  fetch = &Impl::fetch_sequential;
  in_current = first;
  while (current < leaves.size() && lengths[current] && in_current > 0 &&
         in_current >= *lengths[current]) {
    in_current -= *lengths[current++];
  }
}

CombinedIterator::Item CombinedIterator::Impl::joined(const std::vector<Batch>& parts) {
  if (iterators.size() == 1 && iterators[0]) ahead_indices = iterators[0]->last_indices();
  return {loaders.unflatten(parts), fetched, 0};
}

std::optional<CombinedIterator::Item> CombinedIterator::Impl::fetch_min_size() {
  std::vector<Batch> parts;
  for (auto& iterator : iterators) {
    auto part = iterator ? iterator->next() : std::nullopt;
    if (!part) return std::nullopt;
    parts.push_back(std::move(*part));
  }
  return joined(parts);
}

std::optional<CombinedIterator::Item> CombinedIterator::Impl::fetch_max_size_cycle() {
  std::vector<Batch> parts;
  for (size_t i = 0; i < iterators.size(); ++i) {
    auto part = iterators[i] ? iterators[i]->next() : std::nullopt;
    if (!part) {
      consumed[i] = true;
      if (std::all_of(consumed.begin(), consumed.end(), [](char c) { return c; })) {
        return std::nullopt;
      }
      iterators[i] = nullptr;  // its workers end before new ones begin
      iterators[i] = leaves[i]->iterate();
      part = iterators[i]->next();
      if (!part) return std::nullopt;  // an empty loader has nothing to go round with
    }
    parts.push_back(std::move(*part));
  }
  return joined(parts);
}

std::optional<CombinedIterator::Item> CombinedIterator::Impl::fetch_max_size() {
  std::vector<Batch> parts(iterators.size());
  bool any = false;
  for (size_t i = 0; i < iterators.size(); ++i) {
    auto part = iterators[i] ? iterators[i]->next() : std::nullopt;
    if (!part) {
      iterators[i] = nullptr;
      continue;
    }
    parts[i] = std::move(*part);
    any = true;
  }
  if (!any) return std::nullopt;
  return joined(parts);
}

std::optional<CombinedIterator::Item> CombinedIterator::Impl::fetch_sequential() {
  while (current < leaves.size()) {
    const int64_t limit = limits.empty() ? kNoLimit : limits[current];
    auto& iterator = iterators[current];
    if (in_current < limit) {
      if (iterator == nullptr) iterator = leaves[current]->iterate();
      if (auto batch = iterator->next()) {
        ahead_indices = iterator->last_indices();
        return Item{std::move(*batch), in_current++, static_cast<int64_t>(current)};
      }
    }
    iterator = nullptr;
    ++current;
    in_current = 0;
  }
  return std::nullopt;
}

std::optional<CombinedIterator::Item> CombinedIterator::Impl::fetch_next() {
  if (length && fetched >= *length) return std::nullopt;
  ahead_indices.clear();
  auto item = (this->*fetch)();
  if (item) ++fetched;
  return item;
}

CombinedIterator::CombinedIterator(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

CombinedIterator::~CombinedIterator() = default;

std::optional<CombinedIterator::Item> CombinedIterator::next() {
  if (!impl_->looked_ahead) {
    // Where the wait for one of several loaders is interrupted, none has given its batch.
    if (impl_->leaves.size() > 1) *impl_->state_before = states_of(impl_->leaves);
    impl_->ahead = impl_->fetch_next();
  }
  impl_->looked_ahead = false;
  impl_->state_before->reset();
  if (impl_->ahead_error) std::rethrow_exception(std::exchange(impl_->ahead_error, nullptr));
  auto item = std::exchange(impl_->ahead, std::nullopt);
  impl_->looked_ahead = !item;  // the end stays the end
  impl_->indices = impl_->ahead_indices;
  if (item) ++impl_->given;
  return item;
}

bool CombinedIterator::done() {
  if (impl_->length) return impl_->given >= *impl_->length || impl_->looked_ahead;
  if (!impl_->looked_ahead) {
    *impl_->state_before = states_of(impl_->leaves);
    impl_->looked_ahead = true;
    try {
      impl_->ahead = impl_->fetch_next();
    } catch (...) {
      impl_->ahead_error = std::current_exception();
    }
  }
  return !impl_->ahead && !impl_->ahead_error;
}

std::optional<int64_t> CombinedIterator::length() const { return impl_->length; }

std::vector<int64_t> CombinedIterator::last_indices() const { return impl_->indices; }

CombinedLoader::CombinedLoader(Loaders loaders, std::string mode)
    : loaders_(std::move(loaders)), mode_(std::move(mode)) {
  if (std::find(modes().begin(), modes().end(), mode_) != modes().end()) return;
  throw MisconfigurationError(str("CombinedLoader got mode \"", mode_, "\", expected one of ",
                                  join(modes()), ".", did_you_mean(mode_, modes())));
}

std::unique_ptr<CombinedIterator> CombinedLoader::iterate_items(int64_t first) {
  auto impl = std::make_unique<CombinedIterator::Impl>();
  impl->loaders = loaders_;
  impl->mode = mode_;
  impl->leaves = flattened();
  impl->limits = limits_;
  impl->lengths = lengths_of(impl->leaves, limits_);
  impl->length = size();
  state_before_ = impl->state_before;
  impl->begin(first);
  return std::unique_ptr<CombinedIterator>(new CombinedIterator(std::move(impl)));
}

std::unique_ptr<LoaderIterator> CombinedLoader::iterate() {
  return std::make_unique<BatchesOnly>(iterate_items());
}

void CombinedLoader::set_limit(int64_t limit) {
  set_limits(std::vector<int64_t>(flattened().size(), limit));
}

void CombinedLoader::set_limits(std::vector<int64_t> limits) {
  if (limits.size() != flattened().size()) {
    throw MisconfigurationError(str("CombinedLoader got ", limits.size(), " limits for ",
                                    flattened().size(), " loaders, expected one for each."));
  }
  for (int64_t limit : limits) {
    if (limit < 0) {
      throw MisconfigurationError(
          str("CombinedLoader got limit ", limit, ", expected 0 batches or more."));
    }
  }
  limits_ = std::move(limits);
}

void CombinedLoader::clear_limits() { limits_.clear(); }

std::optional<int64_t> CombinedLoader::size() const {
  return combine(mode_, lengths_of(flattened(), limits_));
}

void CombinedLoader::set_epoch(int64_t epoch) {
  for (const auto& loader : flattened()) loader->set_epoch(epoch);
}

namespace {

// The combined loader with each leaf replaced by what `answer` gives for it.
template <class Answer>
std::shared_ptr<Loader> with_answers(const CombinedLoader& combined, Answer answer) {
  auto leaves = combined.flattened();
  bool any = false;
  for (auto& leaf : leaves) {
    if (auto other = answer(*leaf)) {
      leaf = std::move(other);
      any = true;
    }
  }
  if (!any) return nullptr;
  auto changed =
      std::make_shared<CombinedLoader>(combined.loaders().with_leaves(leaves), combined.mode());
  if (!combined.limits().empty()) changed->set_limits(combined.limits());
  return changed;
}

}  // namespace

std::shared_ptr<Loader> CombinedLoader::sequential() const {
  return with_answers(*this, [](const Loader& loader) { return loader.sequential(); });
}

std::shared_ptr<Loader> CombinedLoader::for_predict() const {
  return with_answers(*this, [](const Loader& loader) { return loader.for_predict(); });
}

std::shared_ptr<Loader> CombinedLoader::distributed(const SamplerArguments& share,
                                                    bool shuffle) const {
  return with_answers(*this,
                      [&](const Loader& loader) { return loader.distributed(share, shuffle); });
}

bool CombinedLoader::shuffles() const {
  const auto leaves = flattened();
  return std::any_of(leaves.begin(), leaves.end(),
                     [](const auto& loader) { return loader->shuffles(); });
}

int64_t CombinedLoader::num_workers() const {
  int64_t fewest = kNoLimit;
  for (const auto& loader : flattened()) fewest = std::min(fewest, loader->num_workers());
  return fewest == kNoLimit ? 0 : fewest;
}

bool CombinedLoader::is_stateful() const {
  const auto leaves = flattened();
  return std::any_of(leaves.begin(), leaves.end(),
                     [](const auto& loader) { return loader->is_stateful(); });
}

State CombinedLoader::state_dict() const {
  const auto before = state_before_.lock();
  return before != nullptr && *before ? **before : states_of(flattened());
}

void CombinedLoader::load_state_dict(const State& state) {
  if (state.empty()) return;
  const auto& states = state.as_list();
  std::vector<std::shared_ptr<Loader>> stateful;
  for (const auto& loader : flattened()) {
    if (loader->is_stateful()) stateful.push_back(loader);
  }
  if (states.size() != stateful.size()) {
    throw CheckpointError(str("The checkpoint holds the places of ", states.size(),
                              " loaders, but this run has ", stateful.size(),
                              " that can take one. Use the loaders of the run that was saved."));
  }
  for (size_t i = 0; i < states.size(); ++i) stateful[i]->load_state_dict(states[i]);
}

State CombinedLoader::one_batch_earlier(State state) const {
  const auto loaders = flattened();
  if (!state.is<State::List>() || (mode_ == "sequential" && loaders.size() > 1)) return {};
  State::List earlier;
  auto saved = state.as_list().begin();
  for (const auto& loader : loaders) {
    if (!loader->is_stateful()) continue;
    // Whether one that has ended gave the last item or had ended before it is not known.
    const auto* ended = saved->find("finished");
    if (mode_ == "max_size" && ended != nullptr && ended->as_bool()) return {};
    earlier.push_back(loader->one_batch_earlier(*saved++));
    if (earlier.back().is_none()) return {};
  }
  return earlier;
}

State CombinedLoader::after_pass(State state) const {
  State::List after;
  auto saved = state.as_list().begin();
  for (const auto& loader : flattened()) {
    if (loader->is_stateful()) after.push_back(loader->after_pass(*saved++));
  }
  return after;
}

void CombinedLoader::set_flattened(const std::vector<std::shared_ptr<Loader>>& loaders) {
  if (loaders.size() != flattened().size()) {
    throw MisconfigurationError(str("CombinedLoader got ", loaders.size(),
                                    " loaders to put in the places of ", flattened().size(), "."));
  }
  loaders_ = loaders_.with_leaves(loaders);
}

}  // namespace lightning
