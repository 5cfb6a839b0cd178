#include "lightning/checkpoint/safetensors.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <numeric>
#include <unordered_set>

#include "lightning/checkpoint/atomic_file.h"
#include "lightning/checkpoint/safetensors_header.h"
#include "lightning/errors.h"

namespace lightning {
namespace {

constexpr uint64_t kLengthBytes = 8;

uint64_t bytes_of(const at::Tensor& tensor) {
  return static_cast<uint64_t>(tensor.numel()) * tensor.element_size();
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
    if (!SafetensorsHeader::knows(tensor.scalar_type())) {
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

// An open file whose errors name it.
class Input {
 public:
  explicit Input(const std::string& path)
      : path_(path), fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (fd_ < 0) fail(std::strerror(errno));
    struct stat found {};
    if (::fstat(fd_, &found) != 0 || !S_ISREG(found.st_mode)) {
      ::close(fd_);
      fail("it is not an ordinary file");
    }
    size_ = static_cast<uint64_t>(found.st_size);
  }
  ~Input() { ::close(fd_); }
  Input(const Input&) = delete;
  Input& operator=(const Input&) = delete;

  uint64_t size() const { return size_; }

  void read(void* data, uint64_t bytes, uint64_t at) const {
    auto* next = static_cast<char*>(data);
    while (bytes > 0) {
      const auto want = static_cast<size_t>(std::min<uint64_t>(bytes, uint64_t{1} << 30));
      const ssize_t got = ::pread(fd_, next, want, static_cast<off_t>(at));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) fail(std::strerror(errno));
      if (got == 0) fail("the file was cut short while it was read");
      next += got;
      at += static_cast<uint64_t>(got);
      bytes -= static_cast<uint64_t>(got);
    }
  }

  [[noreturn]] void fail(const std::string& reason) const {
    throw CheckpointError(str("Cannot read ", path_, ": ", reason, "."));
  }

 private:
  std::string path_;
  int fd_;
  uint64_t size_ = 0;
};

uint64_t header_length(const Input& file) {
  if (file.size() < kLengthBytes) file.fail(str("it has only ", file.size(), " bytes"));
  unsigned char raw[kLengthBytes];
  file.read(raw, kLengthBytes, 0);
  uint64_t length = 0;
  for (size_t i = 0; i < kLengthBytes; ++i) length |= uint64_t{raw[i]} << (8 * i);
  if (length > SafetensorsHeader::kMostBytes) {
    file.fail("it is not a safetensors file, or its first bytes are damaged");
  }
  if (length > file.size() - kLengthBytes) {
    file.fail(str("it is cut short: a header of ", length, " bytes is announced, the file has ",
                  file.size()));
  }
  return length;
}

at::Tensor read_tensor(const Input& file, const SafetensorsHeader::Entry& entry, uint64_t data) {
  auto tensor = at::empty(entry.sizes, at::TensorOptions().dtype(entry.dtype));
  auto* values = tensor.numel() > 0 ? tensor.mutable_data_ptr() : nullptr;
  file.read(values, entry.end - entry.begin, data + entry.begin);
  if (entry.dtype == at::kBool) {
    const auto* bytes = static_cast<const unsigned char*>(values);
    if (std::any_of(bytes, bytes + tensor.numel(), [](unsigned char byte) { return byte > 1; })) {
      file.fail(str("\"", entry.name, "\" holds values that are no bools"));
    }
  }
  return tensor;
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
    header.entries.push_back({name, tensor.scalar_type(), tensor.sizes().vec(), begin, end});
  }
  const std::string json = header.to_json();
  unsigned char length[kLengthBytes];
  for (size_t i = 0; i < kLengthBytes; ++i) {
    length[i] = static_cast<unsigned char>(json.size() >> (8 * i));
  }

  AtomicFile file(path, kLengthBytes + json.size() + end);
  file.write(length, kLengthBytes);
  file.write(json.data(), json.size());
  for (const size_t i : order) {
    const auto values = packed(content.tensors[i].second);
    if (values.numel() > 0) file.write(values.const_data_ptr(), bytes_of(values));
  }
  file.commit();
}

SafetensorsContent read_safetensors(const std::string& path) {
  const Input file(path);
  const uint64_t length = header_length(file);
  const uint64_t data = kLengthBytes + length;
  std::string json(length, '\0');
  file.read(json.data(), length, kLengthBytes);

  SafetensorsContent content;
  SafetensorsHeader header;
  try {
    header = SafetensorsHeader::parse(json, file.size() - data);
  } catch (const CheckpointError& error) {
    file.fail(error.what());
  }
  content.metadata = std::move(header.metadata);
  for (const auto& entry : header.entries) {
    content.tensors.emplace_back(entry.name, read_tensor(file, entry, data));
  }
  return content;
}

}  // namespace lightning
