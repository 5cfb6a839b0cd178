#include "lightning/checkpoint/safetensors.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <numeric>
#include <optional>
#include <unordered_set>

#include "lightning/checkpoint/atomic_file.h"
#include "lightning/checkpoint/mapped_file.h"
#include "lightning/checkpoint/scalar_type.h"
#include "lightning/checkpoint/threads.h"
#include "lightning/errors.h"

namespace lightning {
namespace {

constexpr uint64_t kLengthBytes = 8;
constexpr uint64_t kPieceBytes = uint64_t{4} << 20;  // what a thread writes at once

uint64_t bytes_of(const at::Tensor& tensor) {
  return static_cast<uint64_t>(tensor.numel()) * tensor.element_size();
}

// None for dtypes that the format does not have.
std::optional<DType> file_dtype(const at::Tensor& tensor) {
  if (tensor.scalar_type() == at::kFloat4_e2m1fn_x2) return DType::kUInt8;
  const auto dtype = dtype_of(tensor.scalar_type());
  if (!dtype || info(*dtype).safetensors.empty()) return std::nullopt;
  return dtype;
}

at::ScalarType torch_dtype(const SafetensorsHeader::Entry& entry) {
  if (entry.is_packed) return at::kFloat4_e2m1fn_x2;
  return scalar_type(entry.dtype);
}

void check_writable(const SafetensorsContent& content) {
  std::unordered_set<std::string> names;
  for (const auto& [name, tensor] : content.tensors) {
    if (name == "__metadata__" || !names.insert(name).second) {
      throw CheckpointError(str("The tensor name \"", name, "\" is ",
                                name == "__metadata__" ? "the format's own" : "taken twice",
                                "; a safetensors file needs another."));
    }
    const bool dense = tensor.defined() && tensor.layout() == at::kStrided && !tensor.is_meta();
    if (!dense) {
      throw CheckpointError(str("\"", name, "\" is ", tensor.toString(),
                                ", expected a dense tensor with storage; a safetensors file holds "
                                "no other. Make it dense before saving."));
    }
    if (!file_dtype(tensor)) {
      throw CheckpointError(
          str("\"", name, "\" is ", c10::getDtypeNames(tensor.scalar_type()).first,
              ", which a safetensors file cannot hold. Known: ", SafetensorsHeader::known_dtypes(),
              "."));
    }
  }
}

// Indices of the tensors, widest elements first.
std::vector<size_t> order_of(const SafetensorsContent& content) {
  std::vector<size_t> order(content.tensors.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return content.tensors[a].second.element_size() > content.tensors[b].second.element_size();
  });
  return order;
}

// The values as they go into the file: row-major, on the host.
at::Tensor packed(const at::Tensor& tensor) {
  auto values = tensor.detach().resolve_conj().resolve_neg();
  // Few operators know 4-bit pairs; their bytes can be copied all the same.
  if (values.scalar_type() == at::kFloat4_e2m1fn_x2) values = values.view(at::kByte);
  return values.cpu().contiguous();
}

// Bytes that lie in memory and go to a place of the file.
struct Piece {
  uint64_t offset;
  const char* data;
  size_t bytes;
};

void write_pieces(AtomicFile& file, const std::vector<Piece>& pieces) {
  uint64_t bytes = 0;
  for (const auto& piece : pieces) bytes += piece.bytes;
  std::atomic<size_t> next{0};
  on_threads(useful_threads(bytes), [&] {
    for (size_t i = next++; i < pieces.size(); i = next++) {
      file.write_at(pieces[i].offset, pieces[i].data, pieces[i].bytes);
    }
  });
}

// Whether the tensor's memory is what goes into the file.
bool lies_packed(const at::Tensor& tensor) {
  return tensor.is_cpu() && tensor.is_contiguous() && !tensor.is_conj() && !tensor.is_neg();
}

[[noreturn]] void refuse(const MappedFile& file, const std::string& reason) {
  file.check();  // then the reason is another
  throw CheckpointError(str("Cannot read ", file.path(), ": ", reason, "."));
}

uint64_t header_length(const MappedFile& file) {
  if (file.size() < kLengthBytes) refuse(file, str("it has only ", file.size(), " bytes"));
  uint64_t length = 0;
  for (size_t i = 0; i < kLengthBytes; ++i) length |= uint64_t{file.data()[i]} << (8 * i);
  if (length > SafetensorsHeader::kMostBytes) {
    refuse(file, "it is not a safetensors file, or its first bytes are damaged");
  }
  if (length > file.size() - kLengthBytes) {
    refuse(file, str("it is cut short: a header of ", length, " bytes is announced, the file has ",
                     file.size()));
  }
  return length;
}

// A file whose header was checked.
struct OpenFile {
  std::shared_ptr<MappedFile> file;
  SafetensorsHeader header;
  uint8_t* data = nullptr;  // behind the header

  explicit OpenFile(const std::string& path);
  void check_values(const SafetensorsHeader::Entry& entry) const;
  at::Tensor tensor(const SafetensorsHeader::Entry& entry) const;
};

OpenFile::OpenFile(const std::string& path) : file(MappedFile::open(path)) {
  const uint64_t length = header_length(*file);
  const uint64_t begin = kLengthBytes + length;
  data = file->data() + begin;
  const std::string_view json(reinterpret_cast<const char*>(file->data()) + kLengthBytes, length);
  try {
    header = SafetensorsHeader::parse(json, file->size() - begin);
  } catch (const CheckpointError& error) {
    refuse(*file, error.what());
  }
}

// A bool that is neither 0 nor 1 is undefined behaviour to whoever reads it.
void OpenFile::check_values(const SafetensorsHeader::Entry& entry) const {
  if (entry.dtype != DType::kBool) return;
  if (std::any_of(data + entry.begin, data + entry.end, [](uint8_t value) { return value > 1; })) {
    refuse(*file, str("\"", entry.name, "\" holds values that are no bools"));
  }
}

at::Tensor OpenFile::tensor(const SafetensorsHeader::Entry& entry) const {
  check_values(entry);
  const auto options = at::TensorOptions().dtype(torch_dtype(entry));
  const uint64_t bytes = entry.end - entry.begin;
  if (bytes == 0) return at::empty(entry.sizes, options);
  uint8_t* values = data + entry.begin;
  const auto address = reinterpret_cast<uintptr_t>(values);
  if (address % std::min<size_t>(info(entry.dtype).bytes, alignof(std::max_align_t)) != 0) {
    auto copy = at::empty(entry.sizes, options);
    std::memcpy(copy.mutable_data_ptr(), values, bytes);
    return copy;
  }
  return at::from_blob(
      values, entry.sizes, [mapping = file](void*) {}, options);
}

}  // namespace

void write_safetensors(const std::string& path, const SafetensorsContent& content) {
  check_writable(content);
  const auto order = order_of(content);
  SafetensorsHeader header;
  header.metadata = content.metadata;
  uint64_t end = 0;
  for (const size_t i : order) {
    const auto& [name, tensor] = content.tensors[i];
    const uint64_t begin = end;
    end += bytes_of(tensor);
    header.entries.push_back({name, *file_dtype(tensor),
                              tensor.scalar_type() == at::kFloat4_e2m1fn_x2, tensor.sizes().vec(),
                              begin, end});
  }
  const std::string json = header.to_json();
  unsigned char length[kLengthBytes];
  for (size_t i = 0; i < kLengthBytes; ++i) {
    length[i] = static_cast<unsigned char>(json.size() >> (8 * i));
  }

  const uint64_t data = kLengthBytes + json.size();
  AtomicFile file(path, data + end);
  file.write(length, kLengthBytes);
  file.write(json.data(), json.size());
  std::vector<Piece> pieces;
  for (size_t i = 0; i < order.size(); ++i) {
    const auto& tensor = content.tensors[order[i]].second;
    const auto& entry = header.entries[i];
    if (tensor.numel() == 0) continue;
    if (!lies_packed(tensor)) {
      const auto values = packed(tensor);
      file.write_at(data + entry.begin, values.const_data_ptr(), entry.end - entry.begin);
      continue;
    }
    const auto* bytes = static_cast<const char*>(tensor.const_data_ptr());
    for (uint64_t at = entry.begin; at < entry.end; at += kPieceBytes) {
      pieces.push_back({data + at, bytes + (at - entry.begin),
                        static_cast<size_t>(std::min(kPieceBytes, entry.end - at))});
    }
  }
  write_pieces(file, pieces);
  file.commit();
}

SafetensorsContent read_safetensors(const std::string& path) {
  OpenFile open(path);
  SafetensorsContent content;
  content.metadata = std::move(open.header.metadata);
  content.tensors.reserve(open.header.entries.size());
  for (const auto& entry : open.header.entries) {
    content.tensors.emplace_back(entry.name, open.tensor(entry));
  }
  open.file->check();
  return content;
}

SafetensorsHeader read_safetensors_header(const std::string& path, bool check_values) {
  OpenFile open(path);
  if (check_values) {
    for (const auto& entry : open.header.entries) open.check_values(entry);
  }
  open.file->check();
  return std::move(open.header);
}

}  // namespace lightning
