// Samples a second that the DataLoader delivers: Fashion-MNIST, shuffled, normalised, in batches.
// The peer is data_loader.py. Prints `samples_per_s N`, of the best of three passes.
//
//   data_loader [num_workers=2] [batch_size=64] [path=batch|samples]
//
// `batch` is the data set as the framework has it, which makes a batch in one go; `samples` makes a
// tensor for each image, which the loader collates, as a data set of a user's would.
#include "lightning/data/data_loader.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

#include "lightning/data/mnist.h"

namespace {

using lightning::Batch;

class OneByOne : public lightning::Dataset {
 public:
  int64_t size() const override { return images_.size(); }
  Batch get(int64_t index) override { return images_.get(index); }

 private:
  lightning::FashionMNIST images_;
};

double samples_per_s(lightning::DataLoader& loader) {
  const auto begin = std::chrono::steady_clock::now();
  int64_t samples = 0;
  for (auto pass = loader.iterate(); auto batch = pass->next();) {
    samples += (*batch)["label"].size(0);
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  return static_cast<double>(samples) / seconds.count();
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t workers = argc > 1 ? std::atoll(argv[1]) : 2;
  const int64_t batch_size = argc > 2 ? std::atoll(argv[2]) : 64;
  const bool by_batch = argc <= 3 || std::string(argv[3]) != "samples";
  std::shared_ptr<lightning::Dataset> dataset;
  if (by_batch) {
    dataset = std::make_shared<lightning::FashionMNIST>();
  } else {
    dataset = std::make_shared<OneByOne>();
  }
  lightning::DataLoader loader(
      dataset, lightning::DataLoaderOptions(batch_size).shuffle(true).num_workers(workers));
  samples_per_s(loader);  // warms caches and allocator
  double best = 0;
  for (int pass = 0; pass < 3; ++pass) best = std::max(best, samples_per_s(loader));
  std::printf("samples_per_s %.0f\n", best);
}
