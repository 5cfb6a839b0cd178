#include "loggers/tensorboard_logger.h"

#include <sys/resource.h>
#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>

#include "lightning/files.h"
#include "lightning/log.h"
#include "lightning/module.h"
#include "lightning/registry.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

using Catch::Contains;
using lightning::Json;
using lightning::Logger;
using lightning::MisconfigurationError;
using lightning::registry;
using lightning::TensorBoardLogger;
using lightning::TensorBoardLoggerOptions;
using lightning::testing::run_python;
using lightning::testing::TempDir;

namespace fs = std::filesystem;

namespace {

// Reads all events under sys.argv[1] by TensorBoard's own loader, checksums included, and writes
// the same to sys.argv[2] with Lightning's logger; `same` compares the two, but for the times.
constexpr const char* kPrelude = R"(
import glob, io, json, os, sys, numpy, torch
from PIL import Image
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
ours, theirs = sys.argv[1:3]

def events(root):
    found = {}
    for path in sorted(glob.glob(root + '/**/events.out.tfevents.*', recursive=True)):
        for raw in RawEventFileLoader(path, detect_file_replacement=False).Load():
            event = Event.FromString(raw)
            assert 1.6e9 < event.wall_time < 4e9, event
            event.wall_time = 0
            if event.HasField('source_metadata'):
                assert event.file_version == 'brain.Event:2'
                continue
            found.setdefault(os.path.relpath(os.path.dirname(path), root), []).append(event)
    return found

def pixels(event):
    image = event.summary.value[0].image
    decoded = numpy.array(Image.open(io.BytesIO(image.encoded_image_string)))
    assert decoded.shape == (image.height, image.width, image.colorspace), decoded.shape
    image.encoded_image_string = b''
    return decoded

def same(a, b):
    if a.summary.value and a.summary.value[0].HasField('image'):
        numpy.testing.assert_array_equal(pixels(a), pixels(b))
    if a.summary.value and a.summary.value[0].HasField('histo'):
        x, y = a.summary.value[0].histo, b.summary.value[0].histo
        for field in 'sum', 'sum_squares':  # added up in another order
            numpy.testing.assert_allclose(getattr(x, field), getattr(y, field), rtol=1e-12, atol=1e-12)
            setattr(x, field, 0); setattr(y, field, 0)
    if a.summary.value and a.summary.value[0].metadata.plugin_data.plugin_name == 'hparams':
        x, y = (e.summary.value[0].metadata.plugin_data for e in (a, b))
        assert HParamsPluginData.FromString(x.content) == HParamsPluginData.FromString(y.content)
        x.content = y.content = b''  # a map, in any order
    assert a == b, f'ours: {a}\ntheirs: {b}'

def compare():
    a, b = events(ours), events(theirs)
    assert a.keys() == b.keys(), (a.keys(), b.keys())
    for folder in a:
        assert len(a[folder]) == len(b[folder]), (folder, len(a[folder]), len(b[folder]))
        for x, y in zip(a[folder], b[folder]): same(x, y)
    print('equal:', sum(map(len, a.values())), 'events in', len(a), 'folders')
)";

std::string compare(const TempDir& dir, const std::string& script) {
  return run_python(kPrelude + script + "\ncompare()\n", {dir.path("ours"), dir.path("theirs")});
}

std::string only_event_file(const std::string& folder) {
  std::string found;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const auto name = entry.path().filename().string();
    if (name.rfind("events.out.tfevents.", 0) != 0) continue;
    REQUIRE(found.empty());
    found = entry.path().string();
  }
  return found;
}

// What TensorBoard's reader finds: {tag: [[step, value], ...]}.
Json scalars(const std::string& folder) {
  return Json::parse(run_python(R"(
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
read = EventAccumulator(sys.argv[1], {'scalars': 0}).Reload()
print(json.dumps({tag: [[e.step, e.value] for e in read.Scalars(tag)] for tag in read.Tags()['scalars']}))
)",
                                {folder}));
}

class Net : public lightning::LightningModule {
 public:
  Net() {
    body =
        register_module("body", torch::nn::Sequential(torch::nn::Linear(4, 8), torch::nn::ReLU()));
    head = register_module("head", torch::nn::Linear(8, 2));
    body->eval();
  }
  lightning::Batch predict_forward(const lightning::Batch& batch) override {
    was_training = is_training();
    return head->forward(body->forward(batch["x"]));
  }
  torch::nn::Sequential body{nullptr};
  torch::nn::Linear head{nullptr};
  bool was_training = true;
};

}  // namespace

TEST_CASE("scalars, texts and charts are the events that the original writes", "[loggers]") {
  TempDir dir;
  {
    TensorBoardLogger logger(TensorBoardLoggerOptions(dir.path("ours")).prefix("run"));
    logger.log_metrics({{"loss", 0.1}, {"acc", 1e-40}}, 0);
    logger.log_metrics({{"loss", -0.0}, {"epoch", 3}}, 12345678901);
    logger.log_metrics({{std::string(300, 't'), 1e300}}, 1);
    logger.add_scalar("plain", 2.5, 7);
    logger.add_scalars("losses/all", {{"a", 1.5}, {"b", 2.5}}, 3);
    logger.add_scalars("losses/all", {{"a", 3.5}}, 4);
    logger.add_text("note", "# Title\n\xC3\xA9t\xC3\xA9", 2);
    logger.add_text("empty", "");
    logger.finalize("success");
    CHECK(lightning::read_file(logger.log_dir() + "/hparams.yaml") == "{}\n");
  }
  CHECK_THAT(compare(dir, R"(
logger = TensorBoardLogger(theirs, prefix='run')
logger.log_metrics({'loss': 0.1, 'acc': 1e-40}, 0)
logger.log_metrics({'loss': -0.0, 'epoch': 3}, 12345678901)
logger.log_metrics({'t' * 300: 1e300}, 1)
writer = logger.experiment
writer.add_scalar('plain', 2.5, 7)
writer.add_scalars('losses/all', {'a': 1.5, 'b': 2.5}, 3)
writer.add_scalars('losses/all', {'a': 3.5}, 4)
writer.add_text('note', '# Title\nété', 2)
writer.add_text('empty', '')
logger.finalize('success')
)"),
             Contains("equal: 11 events in 3 folders"));
}

TEST_CASE("histograms have the original's buckets", "[loggers]") {
  TempDir dir;
  torch::manual_seed(0);
  const std::vector<at::Tensor> cases = {torch::randn({1000}, torch::kDouble),
                                         torch::randn({3, 50}) * 1e-13,
                                         torch::zeros({5}),
                                         torch::arange(-20, 20),
                                         torch::full({3}, 1e-12),
                                         torch::rand({100}) + 5,
                                         torch::tensor({0.5}),
                                         torch::randn({64}) * 1e10};
  {
    TensorBoardLogger logger(dir.path("ours"));
    for (size_t i = 0; i < cases.size(); ++i) {
      const auto values = cases[i].to(torch::kDouble).contiguous();
      std::ofstream(dir.path("values" + std::to_string(i)), std::ios::binary)
          .write(static_cast<const char*>(values.data_ptr()),
                 static_cast<std::streamsize>(values.nbytes()));
      logger.add_histogram("h", cases[i], static_cast<int64_t>(i));
      logger.add_histogram("few", cases[i], static_cast<int64_t>(i), {}, 100);
      logger.add_histogram("own", cases[i], static_cast<int64_t>(i), {-1e30, -1, 0, 1, 2, 1e30});
    }
  }
  CHECK_THAT(compare(dir, R"(
logger = TensorBoardLogger(theirs)
for i in range(8):
    values = numpy.fromfile(os.path.dirname(ours) + f'/values{i}')
    logger.experiment.add_histogram('h', values, i)
    logger.experiment.add_histogram('few', values, i, max_bins=100)
    logger.experiment.add_histogram('own', values, i, bins=[-1e30, -1, 0, 1, 2, 1e30])
logger.finalize('success')
)"),
             Contains("equal: 24 events"));
}

TEST_CASE("a histogram without values is refused", "[loggers]") {
  TempDir dir;
  TensorBoardLogger logger(dir.path());
  CHECK_THROWS_WITH(logger.add_histogram("h", torch::empty({0}), 0), Contains("without elements"));
  CHECK_THROWS_WITH(logger.add_histogram("h", torch::full({2}, NAN), 0),
                    Contains("none of 2 values"));
  CHECK_THROWS_WITH(logger.add_histogram("h", torch::ones({2}), 0, {2, 1}),
                    Contains("ascending order"));
}

TEST_CASE("images show the original's pixels", "[loggers]") {
  TempDir dir;
  torch::manual_seed(0);
  const auto image = torch::randint(0, 256, {10, 4, 5, 7}, torch::kUInt8);
  std::ofstream(dir.path("image"), std::ios::binary)
      .write(static_cast<const char*>(image.data_ptr()),
             static_cast<std::streamsize>(image.nbytes()));
  const auto real = (image.to(torch::kFloat) - 20) / 200;  // some outside of 0 to 1
  {
    TensorBoardLogger logger(dir.path("ours"));
    logger.add_image("chw", image[0], 0);
    logger.add_image("rgb", image[0].slice(0, 0, 3), 1);
    logger.add_image("grey", image[0].slice(0, 0, 1), 1);
    logger.add_image("hwc", image[1].permute({1, 2, 0}), 2, "HWC");
    logger.add_image("hw", real[2][0], 3, "HW");
    logger.add_image("wh", real[2][0], 3, "WH");
    logger.add_image("float", real[3].slice(0, 0, 3), 4);
    logger.add_image("grid", image.slice(1, 0, 3), 5, "NCHW");
    logger.add_image("greys", real.slice(1, 0, 1), 5, "nchw");
  }
  CHECK_THAT(compare(dir, R"(
image = numpy.fromfile(os.path.dirname(ours) + '/image', numpy.uint8).reshape(10, 4, 5, 7)
real = (torch.tensor(image).float() - 20) / 200
logger = TensorBoardLogger(theirs)
writer = logger.experiment
writer.add_image('chw', image[0], 0)
writer.add_image('rgb', image[0, :3], 1)
writer.add_image('grey', image[0, :1], 1)
writer.add_image('hwc', image[1].transpose(1, 2, 0), 2, dataformats='HWC')
writer.add_image('hw', real[2, 0], 3, dataformats='HW')
writer.add_image('wh', real[2, 0], 3, dataformats='WH')
writer.add_image('float', real[3, :3], 4)
writer.add_images('grid', image[:, :3], 5)
writer.add_images('greys', real[:, :1], 5)
logger.finalize('success')
)"),
             Contains("equal: 9 events"));

  TensorBoardLogger logger(dir.path("refused"));
  CHECK_THROWS_WITH(logger.add_image("x", image[0].slice(0, 0, 2), 0),
                    Contains("[2, 5, 7]") && Contains("1, 3 or 4 channels"));
  CHECK_THROWS_WITH(logger.add_image("x", image, 0), Contains("\"CHW\"") && Contains("each dim"));
}

TEST_CASE("hyper-parameters reach the hparams tab as from the original", "[loggers]") {
  TempDir dir;
  const Json hparams = {{"lr", 1e-5},
                        {"layers", {1, 2}},
                        {"name", "adam"},
                        {"n", 3},
                        {"on", true},
                        {"none", nullptr},
                        {"opt", {{"beta", 0.9}}},
                        {"blocks", {{{"width", 3}}, {{"width", 4}}}}};
  {
    TensorBoardLogger logger(dir.path("ours"));
    logger.log_hyperparams(hparams);
    logger.log_hyperparams(hparams, {{"best/acc", 0.5}, {"loss", 1}}, 4);
    logger.add_hparams({{"lr", 0.1}, {"kind", "a"}}, {{"m", 2}},
                       {{"kind", {"a", "b"}}, {"lr", {0.1, 0.2}}}, "trial", 2);
    logger.finalize("success");
  }
  const std::string script = "hparams = json.loads(r'''" + hparams.dump() + "''')\n" + R"(
logger = TensorBoardLogger(theirs)
logger.log_hyperparams(dict(hparams))
logger.log_hyperparams(dict(hparams), {'best/acc': 0.5, 'loss': 1}, 4)
logger.experiment.add_hparams({'lr': 0.1, 'kind': 'a'}, {'m': 2},
                              {'kind': ['a', 'b'], 'lr': [0.1, 0.2]}, 'trial', 2)
logger.finalize('success')
from tensorboard.plugins.hparams import metadata
run = EventAccumulator(ours + '/lightning_logs/version_0').Reload()
content = run.SummaryMetadata('_hparams_/session_start_info').plugin_data.content
start = metadata.parse_session_start_info_plugin_data(content)
assert start.hparams['lr'].number_value == 1e-5 and start.hparams['layers'].string_value == '[1, 2]'
assert start.hparams['opt/beta'].number_value == 0.9 and start.hparams['none'].string_value == 'None'
assert run.Scalars('hp_metric')[0].value == -1
read = lambda root: open(root + '/lightning_logs/version_0/hparams.yaml').read()
assert read(ours) == read(theirs), read(ours)
)";
  CHECK_THAT(compare(dir, script), Contains("equal: 13 events in 2 folders"));
}

TEST_CASE("without hp_metric and metrics only hparams.yaml holds the hyper-parameters",
          "[loggers]") {
  TempDir dir;
  TensorBoardLogger logger(TensorBoardLoggerOptions(dir.path()).default_hp_metric(false));
  logger.log_hyperparams({{"lr", 0.5}});
  logger.save();
  CHECK(lightning::read_file(logger.log_dir() + "/hparams.yaml") == "lr: 0.5\n");
  CHECK(scalars(logger.log_dir()).empty());
  logger.log_hyperparams({{"lr", 0.25}});
  logger.save();  // written once
  CHECK(lightning::read_file(logger.log_dir() + "/hparams.yaml") == "lr: 0.5\n");
}

TEST_CASE("TensorBoard's event files lie in save_dir/name/version/sub_dir", "[loggers]") {
  TempDir dir;
  setenv("LIGHTNING_TEST_SUB", "deep", 1);
  TensorBoardLogger logger(TensorBoardLoggerOptions(dir.path())
                               .name("exp")
                               .version("best")
                               .sub_dir("$LIGHTNING_TEST_SUB")
                               .filename_suffix(".rank0"));
  CHECK(logger.log_dir() == dir.path("exp/best/deep"));
  CHECK_FALSE(fs::exists(dir.path("exp")));
  logger.log_metrics({{"a", 1.0}}, 0);
  const auto name = fs::path(only_event_file(logger.log_dir())).filename().string();
  char host[256] = {};
  gethostname(host, sizeof(host) - 1);
  CHECK_THAT(name, Catch::Matches("events\\.out\\.tfevents\\.[0-9]{10}\\." + std::string(host) +
                                  "\\." + std::to_string(getpid()) + "\\.[0-9]+\\.rank0"));
  const auto made = registry<Logger>().make("TensorBoardLogger", Json{{"version", 2}});
  made->set_default_root_dir("root");
  CHECK(made->log_dir() == "root/lightning_logs/version_2");
}

TEST_CASE("options that make no sense are refused", "[loggers]") {
  CHECK_THROWS_WITH(TensorBoardLogger(TensorBoardLoggerOptions().max_queue(0)),
                    Contains("max_queue 0"));
  CHECK_THROWS_WITH(TensorBoardLogger(TensorBoardLoggerOptions().flush_secs(0)),
                    Contains("flush_secs 0"));
}

TEST_CASE("events reach the disk by number and by time, and all by the end", "[loggers]") {
  TempDir dir;
  const auto wait_for = [](const auto& condition) {
    for (int i = 0; i < 500 && !condition(); ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    return condition();
  };
  auto logger = std::make_unique<TensorBoardLogger>(
      TensorBoardLoggerOptions(dir.path("number")).max_queue(5).flush_secs(1000));
  for (int step = 0; step < 4; ++step) logger->log_metrics({{"a", step}}, step);
  const auto folder = logger->log_dir();
  const auto file = only_event_file(folder);
  const auto before = fs::file_size(file);
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  CHECK(fs::file_size(file) == before);
  logger->log_metrics({{"a", 4}}, 4);
  CHECK(wait_for([&] { return fs::file_size(file) > before; }));
  logger->log_metrics({{"a", 5}}, 5);
  logger.reset();  // without save or finalize, as an exception leaves it
  CHECK(scalars(folder)["a"].size() == 6);

  TensorBoardLogger timed(
      TensorBoardLoggerOptions(dir.path("time")).max_queue(1000).flush_secs(0.05));
  timed.log_metrics({{"a", 1}}, 0);
  CHECK(wait_for([&] { return fs::file_size(only_event_file(timed.log_dir())) > before; }));
}

TEST_CASE("after finalize the next write opens another event file", "[loggers]") {
  TempDir dir;
  TensorBoardLogger logger(dir.path());
  logger.log_metrics({{"a", 1}}, 0);
  logger.finalize("success");
  logger.log_metrics({{"a", 2}}, 1);
  logger.finalize("failed");
  CHECK(std::distance(fs::directory_iterator(logger.log_dir()), {}) == 3);  // and hparams.yaml
  CHECK(scalars(logger.log_dir()) == Json{{"a", {{0, 1.0}, {1, 2.0}}}});
}

TEST_CASE("a full disk is an error, and costs no event once there is room again", "[loggers]") {
  TempDir dir;
  TensorBoardLogger logger(TensorBoardLoggerOptions(dir.path()).max_queue(1000));
  logger.save();
  const auto file = only_event_file(logger.log_dir());
  rlimit unlimited;
  getrlimit(RLIMIT_FSIZE, &unlimited);
  std::signal(SIGXFSZ, SIG_IGN);
  const auto before = fs::file_size(file);
  const rlimit small{before + 50, unlimited.rlim_max};
  setrlimit(RLIMIT_FSIZE, &small);
  for (int step = 0; step < 20; ++step) logger.log_metrics({{"a", step}}, step);
  CHECK_THROWS_WITH(logger.save(), Contains(file) && Contains("File too large"));
  CHECK(fs::file_size(file) == before);
  setrlimit(RLIMIT_FSIZE, &unlimited);
  logger.finalize("failed");
  CHECK(scalars(logger.log_dir())["a"].size() == 20);
}

TEST_CASE("log_graph writes the traced forward, and leaves the modes as they were", "[loggers]") {
  TempDir dir;
  Net net;
  net.example_input_array = lightning::Batch::map({{"x", torch::randn({2, 4})}});
  TensorBoardLogger logger(TensorBoardLoggerOptions(dir.path()).log_graph(true));
  logger.log_graph(net);
  logger.finalize("success");
  CHECK_FALSE(net.was_training);
  CHECK(net.is_training());
  CHECK_FALSE(net.body->is_training());
  CHECK(net.head->is_training());
  auto nodes = Json::parse(run_python(R"(
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
graph = EventAccumulator(sys.argv[1]).Reload().Graph()
names = [n.name for n in graph.node]
assert len(set(names)) == len(names) and all(i in names for n in graph.node for i in n.input), graph
shape = lambda n: [d.size for d in n.attr['_output_shapes'].list.shape[0].dim] if n.attr['_output_shapes'].list.shape else None
print(json.dumps({n.name.split('_')[0]: [n.op, shape(n)] for n in graph.node}))
)",
                                      {logger.log_dir()}));
  INFO(nodes.dump(1));
  CHECK(nodes["input/x"] == Json({"Parameter", {2, 4}}));
  CHECK(nodes["body/0/weight"] == Json({"Parameter", {8, 4}}));
  CHECK(nodes["body/0/addmm"] == Json({"aten::addmm", {2, 8}}));
  CHECK(nodes["relu"] == Json({"aten::relu", {2, 8}}));
  CHECK(nodes["head/addmm"] == Json({"aten::addmm", {2, 2}}));
  CHECK(nodes["output/output.1"] == Json({"IO Node", {2, 2}}));
}

TEST_CASE("log_graph without an example input warns, and without the option does nothing",
          "[loggers]") {
  TempDir dir;
  Net net;
  std::string warned;
  lightning::set_log_sink([&](const std::string& line) { warned += line; });
  TensorBoardLogger(dir.path()).log_graph(net);
  CHECK(warned.empty());
  TensorBoardLogger(TensorBoardLoggerOptions(dir.path()).log_graph(true)).log_graph(net);
  lightning::set_log_sink({});
  CHECK_THAT(warned, Contains("example_input_array"));
}
