// A GPT learns to write fortune cookies, byte by byte: `make gpt2`.
#include <torch/torch.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "examples/gpt2/gpt.h"
#include "lightning.h"

using namespace lightning;

struct Writer : LightningModule {
  explicit Writer(const GPTOptions& o) : LightningModule(o), options(o) {}
  void configure_model() override { net = register_module("net", gpt::GPT(options)); }
  // The loss of each byte but the first, given those before it.
  at::Tensor loss(const Batch& batch) {
    const auto text = batch["text"].to(at::kLong);
    return net->loss(text.slice(1, 0, -1), text.slice(1, 1).contiguous());
  }
  StepOutput training_step(const Batch& batch, int64_t) override {
    const auto value = loss(batch);
    log("train_loss", value, LogOptions().prog_bar(true));
    return value;
  }
  StepOutput validation_step(const Batch& batch, int64_t batch_idx) override {
    log("val_loss", loss(batch), LogOptions().prog_bar(true));
    if (batch_idx == 0 && !trainer().sanity_checking()) print(write("%\n", 200));
    return skip;
  }
  Optimizers configure_optimizers() override {
    std::vector<at::Tensor> matrices, others;
    for (const auto& p : parameters()) (p.dim() > 1 ? matrices : others).push_back(p);
    using torch::optim::AdamWOptions;
    const auto adamw = AdamWOptions(options.lr()).betas({0.9, 0.95});
    const auto group = [&](const std::vector<at::Tensor>& params, double decay) {
      return torch::optim::OptimizerParamGroup(
          params, std::make_unique<AdamWOptions>(AdamWOptions(adamw).weight_decay(decay)));
    };
    auto optimizer = std::make_shared<torch::optim::AdamW>(
        std::vector<torch::optim::OptimizerParamGroup>{group(matrices, options.weight_decay()),
                                                       group(others, 0.0)},
        adamw);
    const auto steps = trainer().estimated_stepping_batches().value_or(100'000);
    const auto decay = std::max<int64_t>(steps - options.warmup_steps(), 1);
    auto schedule = std::make_shared<WarmupLR>(
        optimizer, WarmupLROptions(options.warmup_steps())
                       .after(CosineAnnealingLROptions(decay).eta_min(options.lr() / 10)));
    return {optimizer, LRSchedulerConfig(schedule).set_interval("step")};
  }
  // `text` and how it goes on, drawn from what the network expects, a little on the safe side.
  // Within a step, where parameters in shards can be read, and the same on all ranks.
  std::string write(std::string text, int64_t length) {
    auto generator = at::detail::createCPUGenerator(/*seed=*/1);  // leaves the run's own alone
    for (int64_t i = 0; i < length; ++i) {
      const auto seen = static_cast<int64_t>(text.size());
      const auto used = std::min(seen, options.context());
      const auto tokens = torch::from_blob(&text[seen - used], {1, used}, at::kByte);
      const auto logits = net->next_logits(tokens.to(device(), at::kLong));
      const auto bytes = (logits.slice(1, 0, 256).cpu().to(at::kFloat) / 0.8).softmax(1);
      text += static_cast<char>(at::multinomial(bytes, 1, false, generator).item<int64_t>());
    }
    const auto is_unprintable = [](char c) {
      return c != '\n' && c != '\t' && (c < ' ' || c > '~');
    };
    std::replace_if(text.begin(), text.end(), is_unprintable, '?');
    return text;
  }
  GPTOptions options;
  gpt::GPT net{nullptr};
};
const Registration<LightningModule> kWriter{
    "Writer", "A GPT over bytes.", [](const GPTOptions& o) { return std::make_shared<Writer>(o); }};

struct FortunesOptions : Options<FortunesOptions> {
  OPTION(std::string, root, "/usr/share/games/fortunes", "Folder of the texts.");
  OPTION(std::vector<std::string>, files,
         (std::vector<std::string>{"art",        "computers", "cookie",     "definitions",
                                   "education",  "fortunes",  "humorists",  "kids",
                                   "law",        "linux",     "literature", "people",
                                   "platitudes", "riddles",   "science",    "songs-poems",
                                   "startrek",   "tao",       "wisdom",     "work"}),
         "Files of it that are read.");
  OPTION(int64_t, length, 128, "Bytes of a sample; at most the model's context.");
  OPTION(int64_t, batch_size, 16, "Samples in a batch.");
};
struct Fortunes : LightningDataModule {
  explicit Fortunes(const FortunesOptions& o) : LightningDataModule(o), options(o) {}
  void setup(Stage) override {
    std::string text;
    for (const auto& name : options.files()) text += read(options.root() + "/" + name) + "%\n";
    const auto size = static_cast<int64_t>(text.size());
    const auto bytes = torch::from_blob(text.data(), {size}, at::kByte).clone();
    // Each sample begins with the byte that the one before it ends with.
    const auto samples = bytes.unfold(0, options.length() + 1, options.length());
    parts = random_split(std::make_shared<TensorDataset>(Batch::map({{"text", samples}})),
                         std::vector<double>{0.95, 0.05}, /*seed=*/0);
  }
  static std::string read(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    if (!in) {
      throw MisconfigurationError("Fortunes cannot read " + path +
                                  ". Install Debian's package fortunes, or name a folder and its "
                                  "files: --data.root texts --data.files '[a.txt, b.txt]'.");
    }
    return {std::istreambuf_iterator<char>(in), {}};
  }
  Loaders train_dataloader() override { return loader(parts.at(0), /*shuffle=*/true); }
  Loaders val_dataloader() override { return loader(parts.at(1)); }
  DataLoader loader(const std::shared_ptr<Dataset>& data, bool shuffle = false) const {
    return {data, DataLoaderOptions(options.batch_size())
                      .shuffle(shuffle)
                      .drop_last(shuffle)
                      .num_workers(1)
                      .pin_memory(true)};
  }
  FortunesOptions options;
  std::vector<std::shared_ptr<Subset>> parts;
};
const Registration<LightningDataModule> kFortunes{
    "Fortunes", "The texts of Debian's package fortunes.",
    [](const FortunesOptions& o) { return std::make_shared<Fortunes>(o); }};

int main(int argc, char** argv) {
  return LightningCLI(LightningCLIOptions().model("Writer").data("Fortunes")).run(argc, argv);
}
