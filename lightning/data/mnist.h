// Images with labels in the idx format of MNIST, as Fashion-MNIST comes in Debian's package
// dataset-fashion-mnist.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "lightning/data/dataset.h"
#include "lightning/options.h"

namespace lightning {

// An idx file of bytes, gzip-compressed or not: uint8, in the shape that the file gives.
// Errors: MisconfigurationError for a file that cannot be read, is torn, or is no idx file of
// bytes.
at::Tensor read_idx(const std::string& path);

// Samples {image: float32 [1, height, width], label: int64}; batches {image: float32 [B, 1, height,
// width], label: int64 [B]}. Pixels are scaled to 0..1 and normalised, (pixel / 255 - mean) / std
// in float32 as torchvision does it. In memory they stay bytes; copies share them.
class ImageBytesDataset : public Dataset {
 public:
  //   images  uint8 [N, height, width]
  //   labels  uint8 [N]
  // Errors: MisconfigurationError for other shapes or dtypes, or a std that is not above 0.
  ImageBytesDataset(const at::Tensor& images, const at::Tensor& labels, double mean = 0.0,
                    double std = 1.0);

  int64_t size() const override { return images_.size(0); }
  Batch get(int64_t index) override;
  std::optional<Batch> get_batch(const std::vector<int64_t>& indices) override;

  const at::Tensor& images() const { return images_; }
  const at::Tensor& labels() const { return labels_; }  // int64 [N]

 private:
  void write_image(int64_t index, float* out) const;

  at::Tensor images_;
  at::Tensor labels_;
  std::array<float, 256> value_of_byte_;
};

struct FashionMNISTOptions : Options<FashionMNISTOptions> {
  OPTION(std::string, root, "/usr/share/datasets/fashion-mnist",
         "Folder with the four idx files, with or without .gz.");
  OPTION(bool, train, true, "The 60000 images for training, or the 10000 for testing.");
  OPTION(double, mean, 0.2860, "Taken from pixels in 0..1.");
  OPTION(double, std, 0.3530, "Pixels are divided by it then.");
};

// 28 x 28 pictures of clothes in ten classes. Also reads MNIST, whose files have the same names.
// Errors: MisconfigurationError that names the Debian package, where a file is missing.
class FashionMNIST : public ImageBytesDataset {
 public:
  explicit FashionMNIST(const FashionMNISTOptions& options = {});

  static const std::vector<std::string>& classes();
};

}  // namespace lightning
