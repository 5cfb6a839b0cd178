#include "lightning/data/mnist.h"

#include <ATen/Functions.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <utility>

#include "lightning/errors.h"

namespace lightning {
namespace {

// A file of bytes, decompressed where it is gzip.
class ByteFile {
 public:
  explicit ByteFile(const std::string& path) : path_(path), file_(gzopen(path.c_str(), "rb")) {
    if (file_ == nullptr) fail("it cannot be opened");
    gzbuffer(file_, 1 << 18);
  }
  ~ByteFile() { gzclose(file_); }
  ByteFile(const ByteFile&) = delete;
  ByteFile& operator=(const ByteFile&) = delete;

  void read(void* out, int64_t bytes) {
    auto* next = static_cast<char*>(out);
    while (bytes > 0) {
      constexpr int64_t kMost = 1 << 30;  // gzread counts in int
      const int got = gzread(file_, next, static_cast<unsigned>(std::min(bytes, kMost)));
      if (got <= 0) fail(str("it ends ", bytes, " bytes before its header says"));
      next += got;
      bytes -= got;
    }
  }
  uint32_t read_number() {
    unsigned char b[4];
    read(b, 4);
    return static_cast<uint32_t>(b[0]) << 24 | static_cast<uint32_t>(b[1]) << 16 |
           static_cast<uint32_t>(b[2]) << 8 | b[3];
  }

  [[noreturn]] void fail(const std::string& why) const {
    throw MisconfigurationError(
        str("Cannot read ", path_, ": ", why, ". Expected an idx file of bytes, as MNIST has."));
  }

 private:
  std::string path_;
  gzFile file_;
};

std::string find(const std::string& root, const std::string& name) {
  for (const std::string& path : {root + "/" + name + ".gz", root + "/" + name}) {
    if (access(path.c_str(), R_OK) == 0) return path;
  }
  throw MisconfigurationError(
      str("FashionMNIST found no ", name, " or ", name, ".gz in ", root,
          ". Install the Debian package dataset-fashion-mnist (apt install dataset-fashion-mnist), "
          "or set root to the folder that holds the files."));
}

std::string file_name(const FashionMNISTOptions& options, const std::string& kind) {
  return find(options.root(), (options.train() ? "train-" : "t10k-") + kind + "-ubyte");
}

}  // namespace

at::Tensor read_idx(const std::string& path) {
  constexpr uint32_t kBytes = 0x08;
  ByteFile file(path);
  const uint32_t magic = file.read_number();
  const uint32_t dims = magic & 0xff;
  if (magic >> 8 != kBytes || dims == 0 || dims > 8)
    file.fail("its first four bytes are not right");
  std::vector<int64_t> sizes;
  for (uint32_t dim = 0; dim < dims; ++dim) sizes.push_back(file.read_number());
  at::Tensor bytes = at::empty(sizes, at::kByte);
  file.read(bytes.mutable_data_ptr(), bytes.numel());
  return bytes;
}

ImageBytesDataset::ImageBytesDataset(const at::Tensor& images, const at::Tensor& labels,
                                     double mean, double std)
    : images_(images.contiguous()) {
  if (images.dim() != 3 || labels.dim() != 1 || images.size(0) != labels.size(0) ||
      images.scalar_type() != at::kByte || labels.scalar_type() != at::kByte) {
    throw MisconfigurationError(str("Got images ", Batch(images).describe(), " and labels ",
                                    Batch(labels).describe(),
                                    ", expected uint8 [N, height, width] and uint8 [N]."));
  }
  if (!(std > 0)) {
    throw MisconfigurationError(
        str("Images cannot be divided by std ", std, ", expected above 0."));
  }
  labels_ = labels.to(at::kLong);
  for (int byte = 0; byte < 256; ++byte) {
    const float scaled = static_cast<float>(byte) / 255.0f;
    value_of_byte_[byte] = (scaled - static_cast<float>(mean)) / static_cast<float>(std);
  }
}

void ImageBytesDataset::write_image(int64_t index, float* out) const {
  const int64_t pixels = images_.size(1) * images_.size(2);
  const uint8_t* in = images_.const_data_ptr<uint8_t>() + index * pixels;
  for (int64_t i = 0; i < pixels; ++i) out[i] = value_of_byte_[in[i]];
}

Batch ImageBytesDataset::get(int64_t index) {
  at::Tensor image = at::empty({1, images_.size(1), images_.size(2)}, at::kFloat);
  write_image(index, image.data_ptr<float>());
  return Batch::map({{"image", image}, {"label", labels_.const_data_ptr<int64_t>()[index]}});
}

std::optional<Batch> ImageBytesDataset::get_batch(const std::vector<int64_t>& indices) {
  const auto count = static_cast<int64_t>(indices.size());
  at::Tensor images = at::empty({count, 1, images_.size(1), images_.size(2)}, at::kFloat);
  at::Tensor labels = at::empty({count}, at::kLong);
  float* image = images.data_ptr<float>();
  int64_t* label = labels.data_ptr<int64_t>();
  for (int64_t index : indices) {
    write_image(index, image);
    *label++ = labels_.const_data_ptr<int64_t>()[index];
    image += images_.size(1) * images_.size(2);
  }
  return Batch::map({{"image", std::move(images)}, {"label", std::move(labels)}});
}

namespace {

ImageBytesDataset read_dataset(const FashionMNISTOptions& options) {
  const at::Tensor images = read_idx(file_name(options, "images-idx3"));
  const at::Tensor labels = read_idx(file_name(options, "labels-idx1"));
  return ImageBytesDataset(images, labels, options.mean(), options.std());
}

}  // namespace

FashionMNIST::FashionMNIST(const FashionMNISTOptions& options)
    : ImageBytesDataset(read_dataset(options)) {}

const std::vector<std::string>& FashionMNIST::classes() {
  static const std::vector<std::string> names = {"T-shirt/top", "Trouser",   "Pullover", "Dress",
                                                 "Coat",        "Sandal",    "Shirt",    "Sneaker",
                                                 "Bag",         "Ankle boot"};
  return names;
}

}  // namespace lightning
