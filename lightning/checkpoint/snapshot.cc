#include "lightning/checkpoint/snapshot.h"

#include <ATen/DeviceAccelerator.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <unordered_map>
#include <utility>

#include "lightning/checkpoint/threads.h"
#include "lightning/errors.h"

namespace lightning {
namespace {

// Offsets keep their remainder by this, so that elements of every dtype stay aligned.
constexpr uint64_t kAlignment = 64;
// What a thread copies at a time.
constexpr uint64_t kStepBytes = uint64_t{4} << 20;
// Pinned memory comes in blocks of powers of two; small storages share one.
constexpr uint64_t kPinnedBlock = uint64_t{64} << 20;

uint64_t rounded_up(uint64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Whether the tensor is a window on a storage, which can be copied instead of it.
bool has_window(const at::Tensor& tensor) {
  return tensor.layout() == at::kStrided && tensor.has_storage() && !tensor.is_quantized() &&
         !tensor.is_meta();
}

// The bytes of its storage that a tensor uses: [first, second).
std::pair<uint64_t, uint64_t> window_of(const at::Tensor& tensor) {
  const auto item = static_cast<uint64_t>(tensor.itemsize());
  const auto begin = static_cast<uint64_t>(tensor.storage_offset()) * item;
  if (tensor.numel() == 0) return {begin, begin};
  uint64_t last = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    last += static_cast<uint64_t>(tensor.stride(dim) * (tensor.size(dim) - 1));
  }
  return {begin, begin + (last + 1) * item};
}

at::TensorOptions bytes_on(c10::Device device) {
  return at::TensorOptions().dtype(at::kByte).device(device);
}

// The bytes of a storage as a tensor. It does not own them.
at::Tensor as_bytes(const c10::Storage& storage, uint64_t begin, uint64_t bytes) {
  auto* data = static_cast<char*>(const_cast<void*>(storage.data())) + begin;
  return at::from_blob(data, {static_cast<int64_t>(bytes)}, bytes_on(storage.device()));
}

}  // namespace

// ---- Memory -------------------------------------------------------------------------------------

class Snapshot::Memory {
 public:
  explicit Memory(uint64_t bytes) : bytes_(bytes) {
    void* data =
        ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) {
      throw CheckpointError(str(
          "Cannot keep a copy of the state to save it in the background, "
          "which needs ",
          bytes_, " bytes of memory: ", std::strerror(errno), ". Save without AsyncCheckpointIO."));
    }
    data_ = static_cast<char*>(data);
    // All pages at once: 1.3 s for a GiB in a virtual machine where touching them one by one takes
    // 2.2 s, huge pages up to 7 s, and the copy itself 0.35 s. An old kernel refuses.
    ::madvise(data_, bytes_, MADV_POPULATE_WRITE);
  }
  ~Memory() { ::munmap(data_, bytes_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  char* data() const { return data_; }
  uint64_t bytes() const { return bytes_; }

 private:
  char* data_ = nullptr;
  uint64_t bytes_;
};

struct Snapshot::Pending {
  c10::Event copied;
};

// ---- What is copied where -----------------------------------------------------------------------

class Snapshot::Plan {
 public:
  // Notes the storages of all tensors of a tree.
  void collect(const State& state) {
    each_tensor(state, [this](const TensorState& tensor) {
      for (const auto& chunk : tensor.chunks) note(chunk.tensor);
    });
  }

  uint64_t bytes() const {
    uint64_t sum = 0;
    for (const auto& piece : pieces_) sum += piece.bytes();
    return sum;
  }

  void copy_host(std::shared_ptr<Memory>& memory);
  void copy_devices(std::vector<at::Tensor>& pinned, std::vector<Pending>& pending);
  // The tree with every tensor on its copy.
  State copied(const State& state) const;

 private:
  // The part of a storage that is in use.
  struct Piece {
    c10::Storage storage;
    uint64_t begin = 0;
    uint64_t end = 0;
    at::Tensor copy;  // bytes, with a storage of its own

    uint64_t bytes() const { return end - begin; }
    at::Tensor source() const { return as_bytes(storage, begin, bytes()); }
  };

  template <class F>
  static void each_tensor(const State& state, const F& f);
  template <class F>
  static void each_tensor(const State::Object& object, const F& f);
  static State::List copied_all(const State::List& items, const Plan& plan);
  void note(const at::Tensor& tensor);
  void copy_device(c10::Device device, const std::vector<Piece*>& pieces,
                   std::vector<at::Tensor>& pinned, std::vector<Pending>& pending);
  void place_pinned(const std::vector<Piece*>& pieces, std::vector<at::Tensor>& pinned,
                    size_t& next_block);
  at::Tensor copied(const at::Tensor& tensor) const;
  std::shared_ptr<const State::Object> copied(const State::Object& object) const;

  std::vector<Piece> pieces_;
  std::unordered_map<const c10::StorageImpl*, size_t> places_;
  size_t next_block_ = 0;
};

template <class F>
void Snapshot::Plan::each_tensor(const State::Object& object, const F& f) {
  for (const auto& item : object.arguments) each_tensor(item, f);
  each_tensor(object.attributes, f);
  for (const auto& item : object.items) each_tensor(item, f);
  for (const auto& entry : object.entries) each_tensor(entry.second, f);
}

template <class F>
void Snapshot::Plan::each_tensor(const State& state, const F& f) {
  if (state.is<TensorState>()) {
    f(state.as_tensor_state());
  } else if (state.is<State::List>() || state.is<State::Tuple>()) {
    for (const auto& item : state.as_list()) each_tensor(item, f);
  } else if (state.is<State::Set>()) {
    for (const auto& item : state.as_set().items) each_tensor(item, f);
  } else if (state.is_dict()) {
    for (const auto& item : state.as_dict()) each_tensor(item.second, f);
    if (const auto& made = state.as_dict().python_class()) each_tensor(*made, f);
  } else if (state.is_object()) {
    each_tensor(state.as_object(), f);
  }
}

void Snapshot::Plan::note(const at::Tensor& tensor) {
  if (!tensor.defined() || !has_window(tensor)) return;
  const auto& storage = tensor.storage();
  auto [begin, end] = window_of(tensor);
  begin = std::min<uint64_t>(begin / kAlignment * kAlignment, storage.nbytes());
  end = std::min<uint64_t>(end, storage.nbytes());
  const auto [place, fresh] = places_.emplace(storage.unsafeGetStorageImpl(), pieces_.size());
  if (fresh) {
    pieces_.push_back({storage, begin, std::max(begin, end), {}});
  } else {
    auto& piece = pieces_[place->second];
    piece.begin = std::min(piece.begin, begin);
    piece.end = std::max(piece.end, end);
  }
}

void Snapshot::Plan::copy_host(std::shared_ptr<Memory>& memory) {
  uint64_t needed = 0;
  for (const auto& piece : pieces_) {
    if (!piece.storage.device().is_cuda()) needed += rounded_up(piece.bytes());
  }
  // Twice too large is given back: a smaller model may follow.
  if (memory != nullptr && (memory->bytes() < needed || memory->bytes() / 2 > needed)) {
    memory.reset();
  }
  if (memory == nullptr && needed > 0) memory = std::make_shared<Memory>(needed);
  struct Step {
    const char* from;
    char* to;
    uint64_t bytes;
  };
  std::vector<Step> steps;
  uint64_t offset = 0;
  for (auto& piece : pieces_) {
    if (piece.storage.device().is_cuda()) continue;
    const auto size = static_cast<int64_t>(piece.bytes());
    if (size == 0) {
      piece.copy = at::empty({0}, at::kByte);
      continue;
    }
    piece.copy = at::from_blob(
        memory->data() + offset, {size}, [memory](void*) {}, bytes_on(at::kCPU));
    offset += rounded_up(piece.bytes());
    if (piece.storage.device().is_cpu()) {
      const auto* from = static_cast<const char*>(piece.storage.data()) + piece.begin;
      auto* to = static_cast<char*>(piece.copy.data_ptr());
      for (uint64_t done = 0; done < piece.bytes(); done += kStepBytes) {
        steps.push_back({from + done, to + done, std::min(kStepBytes, piece.bytes() - done)});
      }
    } else {
      piece.copy.copy_(piece.source());
    }
  }
  // The threads take the next step when they are done with one, and wait for each other once: a
  // core that other programs use delays little.
  std::atomic<size_t> next{0};
  on_threads(useful_threads(needed), [&] {
    for (size_t i = next++; i < steps.size(); i = next++) {
      std::memcpy(steps[i].to, steps[i].from, steps[i].bytes);
    }
  });
}

// ---- From devices -------------------------------------------------------------------------------

void Snapshot::Plan::copy_devices(std::vector<at::Tensor>& pinned, std::vector<Pending>& pending) {
  std::vector<std::pair<c10::Device, std::vector<Piece*>>> devices;
  for (auto& piece : pieces_) {
    const auto device = piece.storage.device();
    if (!device.is_cuda()) continue;
    const auto known = std::find_if(devices.begin(), devices.end(),
                                    [&](const auto& one) { return one.first == device; });
    if (known != devices.end()) {
      known->second.push_back(&piece);
    } else {
      devices.push_back({device, {&piece}});
    }
  }
  for (const auto& [device, pieces] : devices) copy_device(device, pieces, pinned, pending);
  pinned.resize(next_block_);
}

// Gives every piece its place in pinned memory.
void Snapshot::Plan::place_pinned(const std::vector<Piece*>& pieces,
                                  std::vector<at::Tensor>& pinned, size_t& next_block) {
  const auto block_of = [&](uint64_t bytes) -> at::Tensor& {
    const size_t place = next_block++;
    if (place == pinned.size()) pinned.emplace_back();
    auto& block = pinned[place];
    const auto has = block.defined() ? static_cast<uint64_t>(block.numel()) : 0;
    if (has < bytes || has / 2 > bytes) {
      block = at::Tensor();
      block = at::empty({static_cast<int64_t>(bytes)}, bytes_on(at::kCPU).pinned_memory(true));
    }
    return block;
  };
  const auto put = [](Piece& piece, const at::Tensor& block, uint64_t offset) {
    auto* data = static_cast<char*>(block.data_ptr()) + offset;
    piece.copy = at::from_blob(
        data, {static_cast<int64_t>(piece.bytes())}, [block](void*) {}, bytes_on(at::kCPU));
  };
  at::Tensor shared;
  uint64_t used = 0;
  for (auto* piece : pieces) {
    const uint64_t bytes = rounded_up(piece->bytes());
    if (bytes == 0) {
      piece->copy = at::empty({0}, at::kByte);
    } else if (bytes > kPinnedBlock / 4) {
      put(*piece, block_of(bytes), 0);
    } else {
      if (!shared.defined() || used + bytes > kPinnedBlock) {
        shared = block_of(kPinnedBlock);
        used = 0;
      }
      put(*piece, shared, used);
      used += bytes;
    }
  }
}

// A copy on the device takes a fiftieth of the time of one to the host, so the caller's stream
// makes that, as far as there is room, and goes on; it waits for what had to be copied to the host
// from where it lies.
void Snapshot::Plan::copy_device(c10::Device device, const std::vector<Piece*>& pieces,
                                 std::vector<at::Tensor>& pinned, std::vector<Pending>& pending) {
  place_pinned(pieces, pinned, next_block_);
  const c10::impl::VirtualGuardImpl impl(device.type());
  const auto current = impl.getStream(device);
  const auto side = impl.getStreamFromGlobalPool(device);
  uint64_t room = at::accelerator::getMemoryInfo(device.index()).first / 2;

  std::vector<std::pair<Piece*, at::Tensor>> staged;
  std::vector<Piece*> direct;
  for (auto* piece : pieces) {
    if (piece->bytes() == 0) continue;
    if (piece->bytes() > room) {
      direct.push_back(piece);
      continue;
    }
    room -= piece->bytes();
    staged.emplace_back(piece, at::empty({static_cast<int64_t>(piece->bytes())}, bytes_on(device)));
    staged.back().second.copy_(piece->source());
  }
  c10::Event ready(device.type());
  ready.record(current);
  ready.block(side);
  {
    const c10::StreamGuard on_side(side);
    for (auto* piece : direct) piece->copy.copy_(piece->source(), /*non_blocking=*/true);
    if (!direct.empty()) {
      c10::Event free_to_change(device.type());
      free_to_change.record(side);
      free_to_change.block(current);
    }
    for (auto& [piece, copy] : staged) {
      piece->copy.copy_(copy, /*non_blocking=*/true);
      impl.recordDataPtrOnStream(copy.storage().data_ptr(), side);  // it may be freed here
    }
  }
  c10::Event copied(device.type());
  copied.record(side);
  pending.push_back({std::move(copied)});
}

// ---- The tree -----------------------------------------------------------------------------------

at::Tensor Snapshot::Plan::copied(const at::Tensor& tensor) const {
  if (!tensor.defined()) return tensor;
  // Sparse and quantized ones: whether they can be saved is for the format to say.
  if (!has_window(tensor)) return tensor.detach().clone();
  const auto& piece = pieces_[places_.at(tensor.storage().unsafeGetStorageImpl())];
  const auto item = static_cast<uint64_t>(tensor.itemsize());
  const auto offset = static_cast<uint64_t>(tensor.storage_offset()) * item;
  auto copy = at::empty({0}, at::TensorOptions().dtype(tensor.scalar_type()));
  if (tensor.numel() == 0) {  // may begin beyond the end of what is copied
    return copy.set_(copy.storage(), 0, tensor.sizes(), tensor.strides());
  }
  copy.set_(piece.copy.storage(), static_cast<int64_t>((offset - piece.begin) / item),
            tensor.sizes(), tensor.strides());
  if (tensor.is_conj()) copy._set_conj(true);
  if (tensor.is_neg()) copy._set_neg(true);
  return copy;
}

State::List Snapshot::Plan::copied_all(const State::List& items, const Plan& plan) {
  State::List all;
  all.reserve(items.size());
  for (const auto& item : items) all.push_back(plan.copied(item));
  return all;
}

std::shared_ptr<const State::Object> Snapshot::Plan::copied(const State::Object& object) const {
  auto copy = std::make_shared<State::Object>();
  copy->how = object.how;
  copy->module = object.module;
  copy->name = object.name;
  copy->arguments = copied_all(object.arguments, *this);
  copy->attributes = copied(object.attributes);
  copy->items = copied_all(object.items, *this);
  for (const auto& [key, value] : object.entries) copy->entries[key] = copied(value);
  return copy;
}

State Snapshot::Plan::copied(const State& state) const {
  if (state.is<TensorState>()) {
    TensorState copy = state.as_tensor_state();
    for (auto& chunk : copy.chunks) chunk.tensor = copied(chunk.tensor);
    return copy;
  }
  if (state.is<State::List>()) return copied_all(state.as_list(), *this);
  if (state.is<State::Tuple>()) return State::Tuple{copied_all(state.as_list(), *this)};
  if (state.is<State::Set>()) {
    return State::Set{copied_all(state.as_set().items, *this), state.as_set().frozen};
  }
  if (state.is_object()) return State::Object(*copied(state.as_object()));
  if (!state.is_dict()) return state;
  State::Dict copy;
  copy.reserve(state.as_dict().size());
  for (const auto& [key, value] : state.as_dict()) copy[key] = copied(value);
  if (const auto& made = state.as_dict().python_class()) copy.set_python_class(copied(*made));
  return copy;
}

// ---- Snapshot -----------------------------------------------------------------------------------

Snapshot::Snapshot() = default;

Snapshot::~Snapshot() = default;

State Snapshot::take(const State& state) {
  const at::NoGradGuard no_grad;
  wait();
  Plan plan;
  plan.collect(state);
  bytes_ = plan.bytes();
  try {
    plan.copy_devices(pinned_, pending_);  // under way while the host's are copied
    plan.copy_host(host_);
    return plan.copied(state);
  } catch (const c10::Error& error) {
    throw CheckpointError(
        str("Cannot keep a copy of the state to save it in the background, which "
            "needs ",
            bytes_, " bytes of memory: ", error.what_without_backtrace(),
            ". Save without AsyncCheckpointIO."));
  }
}

void Snapshot::wait() {
  for (const auto& one : pending_) one.copied.synchronize();
  pending_.clear();
}

void Snapshot::release() {
  wait();
  host_.reset();
  pinned_.clear();
}

uint64_t Snapshot::bytes() const { return bytes_; }

}  // namespace lightning
