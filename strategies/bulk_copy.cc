#include "strategies/bulk_copy.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <iterator>
#include <optional>
#include <unordered_map>

#include "lightning/checkpoint/mapped_file.h"
#include "lightning/checkpoint/threads.h"
#include "strategies/side_stream.h"

namespace lightning {
namespace {

constexpr int64_t kPieceBytes = int64_t{4} << 20;

// A part of a copy, as bytes.
struct Piece {
  at::Tensor to;
  const char* from;
};

bool is_of_bytes(const at::Tensor& to, const at::Tensor& from) {
  return from.is_cpu() && (to.is_cpu() || to.is_cuda()) && to.dtype() == from.dtype() &&
         to.is_contiguous() && from.is_contiguous() && to.sizes() == from.sizes() &&
         !to.is_conj() && !from.is_conj() && !to.is_neg() && !from.is_neg();
}

at::Tensor bytes_of(const at::Tensor& tensor) { return tensor.view({-1}).view(at::kByte); }

void add_pieces(const at::Tensor& to, const at::Tensor& from, std::vector<Piece>& pieces) {
  const auto target = bytes_of(to);
  const auto* const source = static_cast<const char*>(from.const_data_ptr());
  for (int64_t at = 0; at < target.numel(); at += kPieceBytes) {
    const auto bytes = std::min(kPieceBytes, target.numel() - at);
    pieces.push_back({target.narrow(0, at, bytes), source + at});
  }
}

void copy_on_host(const Piece& piece) {
  std::memcpy(piece.to.mutable_data_ptr(), piece.from, piece.to.nbytes());
}

// Of one thread.
class Carrier {
 public:
  explicit Carrier(c10::Device device)
      : stream_(device),
        buffer_(at::empty({kPieceBytes}, at::TensorOptions(at::kByte).pinned_memory(true))) {}

  void carry(const Piece& piece) const {
    const auto buffer = buffer_.narrow(0, 0, piece.to.numel());
    std::memcpy(buffer.mutable_data_ptr(), piece.from, piece.to.nbytes());
    const Scope beside = stream_.use();
    piece.to.copy_(buffer);  // waits for it
  }

 private:
  SideStream stream_;
  at::Tensor buffer_;
};

void run_pieces(const std::vector<Piece>& pieces, c10::Device device) {
  const bool to_host = device.is_cpu();
  uint64_t bytes = 0;
  for (const auto& piece : pieces) bytes += piece.to.nbytes();
  const int threads = useful_threads(bytes, kMostReaders);
  if (!to_host) SideStream(device).mark_current().synchronize();  // who used the memory before
  std::atomic<size_t> next{0};
  on_threads(threads, [&] {
    const at::NoGradGuard no_grad;
    std::optional<Carrier> carrier;
    for (size_t i = next++; i < pieces.size(); i = next++) {
      if (to_host) {
        copy_on_host(pieces[i]);
        continue;
      }
      if (!carrier) carrier.emplace(device);
      carrier->carry(pieces[i]);
    }
  });
}

}  // namespace

void BulkCopy::add(at::Tensor to, at::Tensor from) {
  const auto begin = reinterpret_cast<uintptr_t>(to.const_data_ptr());
  const auto end = begin + at::detail::computeStorageNbytes(to.sizes(), to.strides(),
                                                            static_cast<size_t>(to.itemsize()));
  const auto behind = targets_.lower_bound(end);
  if (behind != targets_.begin() && std::prev(behind)->second > begin) run();
  if (begin != end) targets_[begin] = end;
  copies_.push_back({std::move(to), std::move(from)});
}

void BulkCopy::run() {
  const at::NoGradGuard no_grad;
  const auto copies = std::exchange(copies_, {});
  targets_.clear();
  std::unordered_map<c10::Device, std::vector<Piece>> pieces;
  for (const auto& [to, from] : copies) {
    if (is_of_bytes(to, from)) {
      add_pieces(to, from, pieces[to.device()]);
    } else {
      to.copy_(from);
    }
  }
  for (const auto& [device, of_device] : pieces) run_pieces(of_device, device);
  check_mapped_files();
}

}  // namespace lightning
