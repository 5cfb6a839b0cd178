#include "callbacks/model_summary.h"

#include <torch/torch.h>

#include <catch2/catch.hpp>

#include "callbacks/rich_model_summary.h"
#include "lightning/registry.h"
#include "lightning/trainer.h"
#include "tests/support/boring.h"
#include "tests/support/screen.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;

namespace {

// A model of every kind of row; the same as the one that gave the table below.
class Plain : public BoringModule {
 public:
  Plain() {
    register_module(
        "net", torch::nn::Sequential(torch::nn::Linear(256, 512), torch::nn::BatchNorm1d(512)));
    register_parameter("w", torch::ones(123));
    layer->weight.requires_grad_(false);
  }
  Batch predict_forward(const Batch& batch) override {
    was_training = is_training();
    return Batch(layer(batch.tensor()));
  }
  bool was_training = true;
};

TrainerOptions options(const TempDir& dir, std::shared_ptr<Callback> summary) {
  return quiet(dir).enable_model_summary(true).callbacks({std::move(summary)}).max_epochs(1);
}

}  // namespace

TEST_CASE("the summary is printed once, when fit starts", "[callbacks]") {
  TempDir dir;
  auto summary = std::make_shared<ModelSummary>();
  auto screen = std::make_shared<Screen>();
  summary->set_output(screen);
  auto module = std::make_shared<Plain>();
  module->example_input_array = at::ones({4, 32});
  Trainer trainer(options(dir, summary));
  trainer.validate(module, Loaders(), RunArguments().verbose(false));
  CHECK(screen->bytes().empty());
  trainer.fit(module);

  CHECK(screen->bytes() == R"(
  | Name         | Type       | Params | Mode  | FLOPs
------------------------------------------------------------
0 | layer        | Linear     | 66     | train | 512  
1 | net          | Sequential | 132 K  | train | 0    
  | other params | n/a        | 123    | n/a   | n/a  
------------------------------------------------------------
132 K     Trainable params
64        Non-trainable params
132 K     Total params
0.531     Total estimated model params size (MB)
4         Modules in train mode
0         Modules in eval mode
512       Total Flops
)");
  CHECK_FALSE(module->was_training);
  CHECK(module->is_training());
}

TEST_CASE("precision decides the size in MB", "[callbacks]") {
  TempDir dir;
  auto summary = std::make_shared<ModelSummary>();
  auto screen = std::make_shared<Screen>();
  summary->set_output(screen);
  Trainer trainer(options(dir, summary).precision("64-true"));
  trainer.fit(std::make_shared<BoringModule>());
  CHECK_THAT(screen->bytes(), Contains("0.001     Total estimated model params size (MB)"));
}

TEST_CASE("a summary of no depth prints nothing", "[callbacks]") {
  TempDir dir;
  auto summary = std::make_shared<ModelSummary>(ModelSummaryOptions().max_depth(0));
  auto screen = std::make_shared<Screen>();
  summary->set_output(screen);
  Trainer trainer(options(dir, summary));
  trainer.fit(std::make_shared<BoringModule>());
  CHECK(screen->bytes().empty());
  CHECK_THROWS_WITH(ModelSummary(ModelSummaryOptions().max_depth(-2)),
                    Contains("got max_depth -2"));
}

TEST_CASE("the rich summary is the table that rich draws", "[callbacks]") {
  TempDir dir;
  auto summary = std::make_shared<RichModelSummary>(RichModelSummaryOptions().max_depth(2));
  auto screen = std::make_shared<Screen>(0, /*terminal=*/false);
  summary->set_output(screen);
  Trainer trainer(options(dir, summary));
  trainer.fit(std::make_shared<Plain>());

  // rich 15.0 from Lightning 2.6.6's RichModelSummary, for the same model.
  const std::string expected = R"(
┏━━━┳━━━━━━━┳━━━━━━━━━━━━━┳━━━━━━━━┳━━━━━━━┳━━━━━━━┓
┃   ┃ Name  ┃ Type        ┃ Params ┃ Mode  ┃ FLOPs ┃
┡━━━╇━━━━━━━╇━━━━━━━━━━━━━╇━━━━━━━━╇━━━━━━━╇━━━━━━━┩
│ 0 │ layer │ Linear      │     66 │ train │     0 │
│ 1 │ net   │ Sequential  │  132 K │ train │     0 │
│ 2 │ net.0 │ Linear      │  131 K │ train │     0 │
│ 3 │ net.1 │ BatchNorm1d │  1.0 K │ train │     0 │
└───┴───────┴─────────────┴────────┴───────┴───────┘
Trainable params: 132 K
Non-trainable params: 64
Total params: 132 K
Total estimated model params size (MB): 0.531
Modules in train mode: 4
Modules in eval mode: 0
Total FLOPs: 0
)";
  CHECK("\n" + screen->bytes() == expected);
}

TEST_CASE("the rich summary is coloured on a terminal and fits it", "[callbacks]") {
  Summary summary;
  summary.layers = {{"a_rather_long_name_of_a_layer", "LinearWithALongName", 1000, true, 0}};
  const auto header = Style::parse("bold magenta", "header_style");
  const auto text = format_rich_summary(summary, header, 60, ColorSystem::kStandard);
  CHECK_THAT(text, Contains("\x1b[1;35m Name ") && Contains("…") &&
                       Contains("\x1b[1mTotal params\x1b[0m: 0"));
  Screen screen(200);
  screen.write(text);
  for (size_t i = 0; i < 5; ++i) CHECK(display_width(screen.lines()[i]) == 60);
}

TEST_CASE("a header style that is none is refused", "[callbacks]") {
  CHECK_THROWS_WITH(RichModelSummary(RichModelSummaryOptions().header_style("blod")),
                    Contains("header_style") && Contains("Did you mean \"bold\"?"));
}
