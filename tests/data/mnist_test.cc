#include "lightning/data/mnist.h"

#include <torch/torch.h>
#include <zlib.h>

#include <catch2/catch.hpp>
#include <fstream>
#include <nlohmann/json.hpp>

#include "lightning/data/data_loader.h"
#include "lightning/errors.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

namespace lightning {
namespace {

using Catch::Matchers::Contains;
using testing::TempDir;

// Two images of 2 x 3 pixels.
const std::string kImages{"\0\0\x8\3\0\0\0\2\0\0\0\2\0\0\0\3\0\1\2\3\4\5\6\7\x8\x9\xa\xff", 28};
const std::string kLabels{"\0\0\x8\1\0\0\0\2\7\3", 10};

void write(const std::string& path, const std::string& bytes, bool compressed = false) {
  if (!compressed) {
    std::ofstream(path, std::ios::binary) << bytes;
    return;
  }
  gzFile file = gzopen(path.c_str(), "wb");
  gzwrite(file, bytes.data(), static_cast<unsigned>(bytes.size()));
  gzclose(file);
}

TEST_CASE("idx files are read compressed and not", "[data]") {
  TempDir dir;
  const bool compressed = GENERATE(false, true);
  write(dir.path("a"), kImages, compressed);
  const auto images = read_idx(dir.path("a"));
  CHECK(images.sizes() == at::IntArrayRef({2, 2, 3}));
  CHECK(images[1][1][2].item<int64_t>() == 255);
}

TEST_CASE("images are scaled and normalised, one by one as by the batch", "[data]") {
  TempDir dir;
  write(dir.path("t10k-images-idx3-ubyte"), kImages);
  write(dir.path("t10k-labels-idx1-ubyte.gz"), kLabels, true);
  FashionMNIST dataset(FashionMNISTOptions().root(dir.path()).train(false).mean(0.5).std(0.25));
  CHECK(dataset.size() == 2);
  const Batch sample = dataset.get(1);
  CHECK(sample["image"].sizes() == at::IntArrayRef({1, 2, 3}));
  CHECK(sample["image"][0][1][2].item<float>() == 2.0f);
  CHECK(sample.at("label").as_int() == 3);

  const auto batch = dataset.get_batch({1, 0, 1});
  CHECK((*batch)["image"].sizes() == at::IntArrayRef({3, 1, 2, 3}));
  CHECK(torch::equal((*batch)["image"][2], sample["image"]));
  CHECK(torch::equal((*batch)["label"], torch::tensor({3, 7, 3})));
}

TEST_CASE("files that are missing or torn are told with what to do", "[data]") {
  TempDir dir;
  CHECK_THROWS_WITH(FashionMNIST(FashionMNISTOptions().root(dir.path())),
                    Contains("train-images-idx3-ubyte") && Contains(dir.path()) &&
                        Contains("apt install dataset-fashion-mnist"));
  write(dir.path("torn"), kImages.substr(0, 20));
  CHECK_THROWS_WITH(read_idx(dir.path("torn")), Contains("ends 8 bytes before"));
  write(dir.path("text"), "hello world");
  CHECK_THROWS_WITH(read_idx(dir.path("text")), Contains("first four bytes"));
  CHECK_THROWS_WITH(read_idx(dir.path("none")), Contains("cannot be opened"));
  CHECK_THROWS_AS(ImageBytesDataset(torch::zeros({2, 2}), torch::zeros({2})),
                  MisconfigurationError);
}

// The files read with numpy, normalised as torchvision's ToTensor and Normalize do it.
constexpr const char* kPython = R"(
import gzip, json, sys, numpy, torch

def read(name, header):
    with gzip.open(f"{sys.argv[1]}/{name}.gz") as f:
        return torch.from_numpy(numpy.frombuffer(f.read(), numpy.uint8, offset=header).copy())

images = read("train-images-idx3-ubyte", 16).view(-1, 1, 28, 28)
labels = read("train-labels-idx1-ubyte", 8).long()
batch = images[:1000].float().div(255).sub_(0.2860).div_(0.3530)
torch.save({"image": batch, "label": labels[:1000]}, sys.argv[2])
print(json.dumps([len(images), hash(labels.sum().item())]))
)";

TEST_CASE("Fashion-MNIST's pixels and labels equal Python's bit for bit", "[data]") {
  const FashionMNISTOptions options;
  if (!std::ifstream(options.root() + "/train-images-idx3-ubyte.gz")) {
    WARN("needs the Debian package dataset-fashion-mnist");
    return;
  }
  TempDir dir;
  const auto python =
      nlohmann::json::parse(testing::run_python(kPython, {options.root(), dir.path("batch.pt")}));
  std::ifstream in(dir.path("batch.pt"), std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(in), {}};
  const auto expected = torch::pickle_load(bytes).toGenericDict();

  const auto dataset = std::make_shared<FashionMNIST>(options);
  CHECK(dataset->size() == python[0].get<int64_t>());
  CHECK(dataset->labels().sum().item<int64_t>() == python[1].get<int64_t>());
  DataLoader loader(dataset, DataLoaderOptions(1000).num_workers(2));
  const auto batch = loader.iterate()->next();
  CHECK(torch::equal((*batch)["image"], expected.at("image").toTensor()));
  CHECK(torch::equal((*batch)["label"], expected.at("label").toTensor()));
  CHECK(FashionMNIST::classes().size() == 10);
}

}  // namespace
}  // namespace lightning
