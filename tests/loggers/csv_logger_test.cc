#include "loggers/csv_logger.h"

#include <sys/resource.h>

#include <catch2/catch.hpp>
#include <csignal>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "lightning/files.h"
#include "lightning/log.h"
#include "lightning/registry.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

using Catch::Contains;
using lightning::CSVLogger;
using lightning::CSVLoggerOptions;
using lightning::Json;
using lightning::Logger;
using lightning::MetricRow;
using lightning::MisconfigurationError;
using lightning::read_file;
using lightning::registry;
using lightning::testing::run_python;
using lightning::testing::TempDir;

namespace {

// Runs the same calls in the original: [[metrics, step] or "save", ...].
constexpr const char* kOriginal = R"(
import json, logging, sys
from lightning.pytorch.loggers import CSVLogger
calls, arguments, hparams = (json.loads(a) for a in sys.argv[2:])
logger = CSVLogger(sys.argv[1], **arguments)
if hparams: logger.log_hyperparams(hparams)
for call in calls:
    if call == 'save': logger.save()
    else:
        metrics = call[0]
        if 'epoch' in metrics: metrics['epoch'] = int(metrics['epoch'])
        logger.log_metrics(metrics, call[1])
logger.finalize('success')
)";

std::string original(const std::string& dir, const Json& calls,
                     const Json& arguments = Json::object(), const Json& hparams = Json::object()) {
  run_python(kOriginal, {dir, calls.dump(), arguments.dump(), hparams.dump()});
  return read_file(dir + "/lightning_logs/version_0/metrics.csv");
}

std::string ours(const std::string& dir, const Json& calls, const CSVLoggerOptions& options) {
  CSVLogger logger(CSVLoggerOptions(options).save_dir(dir));
  for (const auto& call : calls) {
    if (call == "save") {
      logger.save();
      continue;
    }
    MetricRow row;
    for (const auto& [name, value] : call[0].items()) row.emplace_back(name, value.get<double>());
    logger.log_metrics(row, call[1].get<int64_t>());
  }
  logger.finalize("success");
  return read_file(dir + "/lightning_logs/version_0/metrics.csv");
}

std::string metrics_csv(const CSVLogger& logger) {
  return read_file(logger.log_dir() + "/metrics.csv");
}

// No file grows past `bytes` while it lives: the disk that fills up.
class SmallDisk {
 public:
  explicit SmallDisk(rlim_t bytes) {
    std::signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit small{bytes, before_.rlim_max};
    setrlimit(RLIMIT_FSIZE, &small);
  }
  ~SmallDisk() { setrlimit(RLIMIT_FSIZE, &before_); }

 private:
  rlimit before_;
};

}  // namespace

TEST_CASE("the CSV logger writes the original's file, byte for byte", "[loggers]") {
  TempDir dir;
  const Json calls = Json::parse(R"([
    [{"train_loss": 0.1, "epoch": 0}, 0], [{"train_loss": 1e-05, "epoch": 0}, 1], "save",
    [{"val_loss": 2.0, "acc": 0.30000001192092896, "epoch": 0}, 1],
    [{"train_loss": 1e16, "lr, \"quoted\"": 123456789.0, "epoch": 1}, 2], "save", "save",
    [{"step": 7, "train_loss": -0.0, "acc": 1e22, "epoch": 1}, 3],
    [{"tiny": 5e-324, "huge": 1.7976931348623157e308, "third": 0.3333333333333333}, 4],
    [{}, 5], [{"acc": 1e15, "train_loss": 0.0001, "Z": 100.0}, 10000000000]])");
  CHECK(ours(dir.path("ours"), calls, {}) == original(dir.path("original"), calls));
}

TEST_CASE("the CSV logger flushes where the original does, with its prefix", "[loggers]") {
  TempDir dir;
  const Json calls = Json::parse(R"([
    [{"a": 1.5, "epoch": 0}, 0], [{"b": 2.5, "epoch": 0}, 1], [{"a": 3.5, "c": 1.0}, 2],
    [{"a": 4.0, "b": 5.0}, 3]])");
  const auto options = CSVLoggerOptions().prefix("run").flush_logs_every_n_steps(2);
  CHECK(
      ours(dir.path("ours"), calls, options) ==
      original(dir.path("original"), calls, {{"prefix", "run"}, {"flush_logs_every_n_steps", 2}}));
}

TEST_CASE("infinity and nan are written as Python's csv writes them", "[loggers]") {
  TempDir dir;
  CSVLogger logger(dir.path());
  logger.log_metrics({{"a", INFINITY}, {"b", -INFINITY}, {"c", NAN}, {"epoch", 0.5}}, 0);
  logger.save();
  CHECK(metrics_csv(logger) == "a,b,c,epoch,step\r\ninf,-inf,nan,0.5,0\r\n");
}

TEST_CASE("the CSV logger's hparams.yaml is the original's, byte for byte", "[loggers]") {
  TempDir dir;
  const Json hparams = {{"lr", 1e-5},
                        {"layers", {1, 2, 3}},
                        {"name", "yes"},
                        {"nested", {{"a", nullptr}, {"b", true}}},
                        {"empty", Json::array()}};
  original(dir.path("original"), Json::parse(R"([[{"a": 1.0}, 0]])"), Json::object(), hparams);
  CSVLogger logger(dir.path("ours"));
  logger.log_hyperparams(hparams);
  const auto text = read_file(logger.log_dir() + "/hparams.yaml");
  CHECK(text == read_file(dir.path("original/lightning_logs/version_0/hparams.yaml")));
  CHECK_THAT(text, Contains("lr: 1.0e-05\n") && Contains("layers:\n- 1\n- 2\n- 3\n"));

  logger.log_hyperparams({{"lr", 0.5}, {"more", 1}});
  CHECK_THAT(read_file(logger.log_dir() + "/hparams.yaml"), Contains("lr: 0.5\nmore: 1\n"));
}

TEST_CASE("versions count up from the folders that are there", "[loggers]") {
  TempDir dir;
  CHECK(CSVLogger(dir.path()).version() == "version_0");
  for (const char* folder : {"version_0", "version_11", "version_9", "version_x", "other_20"}) {
    lightning::make_directories(dir.path(std::string("lightning_logs/") + folder));
  }
  lightning::write_file(dir.path("lightning_logs/version_50"), "a file does not count");
  CSVLogger logger(dir.path());
  CHECK(logger.log_dir() == dir.path("lightning_logs/version_12"));
  CHECK_FALSE(std::filesystem::exists(logger.log_dir()));  // until something is written
  logger.save();
  CHECK(std::filesystem::is_directory(logger.log_dir()));
  CHECK(logger.version() == "version_12");
  CHECK(CSVLogger(dir.path()).version() == "version_13");
}

TEST_CASE("name and version make the folder, as numbers or names", "[loggers]") {
  const auto folder = [](const CSVLoggerOptions& options) {
    return CSVLogger(CSVLoggerOptions(options).save_dir("root")).log_dir();
  };
  CHECK(folder(CSVLoggerOptions().version(3)) == "root/lightning_logs/version_3");
  CHECK(folder(CSVLoggerOptions().name("a").version("best")) == "root/a/best");
  CHECK(folder(CSVLoggerOptions().name("").version(0)) == "root/version_0");
  CHECK(folder(CSVLoggerOptions().name(std::nullopt).version(0)) == "root/version_0");

  CSVLogger logger;
  logger.set_default_root_dir("elsewhere");
  CHECK(logger.save_dir() == "elsewhere");
  CHECK(logger.log_dir() == "elsewhere/lightning_logs/version_0");
  CSVLogger given(CSVLoggerOptions("mine"));
  given.set_default_root_dir("elsewhere");
  CHECK(given.save_dir() == "mine");
}

TEST_CASE("the CSV logger is made by name from a configuration", "[loggers]") {
  TempDir dir;
  const auto logger = registry<Logger>().make(
      "CSVLogger", Json{{"save_dir", dir.path()}, {"version", 4}, {"name", nullptr}});
  CHECK(logger->log_dir() == dir.path("version_4"));
  CHECK_THROWS_WITH(registry<Logger>().make("CSVLogger", Json{{"savedir", "x"}}),
                    Contains("savedir is not an option") && Contains("save_dir"));
  CHECK_THROWS_WITH(CSVLogger(CSVLoggerOptions().flush_logs_every_n_steps(0)),
                    Contains("flush_logs_every_n_steps 0"));
  CHECK_THROWS_AS(CSVLogger(CSVLoggerOptions().version(-1)), MisconfigurationError);
}

TEST_CASE("metrics of an earlier run in the same folder are deleted, with a warning", "[loggers]") {
  TempDir dir;
  std::string warned;
  lightning::set_log_sink([&](const std::string& line) { warned += line; });
  const auto options = CSVLoggerOptions(dir.path()).version("same");
  CSVLogger(options).log_metrics({{"old", 1.0}}, 0);
  CHECK(warned.empty());
  CSVLogger again(options);
  again.log_metrics({{"new", 2.0}}, 0);
  again.save();
  lightning::set_log_sink({});
  CHECK_THAT(warned, Contains("deletes " + again.log_dir() + "/metrics.csv"));
  CHECK(metrics_csv(again) == "new,step\r\n2.0,0\r\n");
}

TEST_CASE("a full disk costs no row: the file stays whole and the next write catches up",
          "[loggers]") {
  TempDir dir;
  CSVLogger logger(CSVLoggerOptions(dir.path()).flush_logs_every_n_steps(1));
  logger.log_metrics({{"a", 0.5}}, 0);
  const auto before = metrics_csv(logger);
  {
    SmallDisk disk(before.size() + 3);
    CHECK_THROWS_WITH(logger.log_metrics({{"a", 1.5}}, 1),
                      Contains(logger.log_dir() + "/metrics.csv") && Contains("File too large"));
    CHECK(metrics_csv(logger) == before);
    CHECK_THROWS(logger.log_metrics({{"b", 2.5}}, 2));  // a new column rewrites the file
    CHECK(metrics_csv(logger) == before);
  }
  logger.finalize("failed");
  CHECK(metrics_csv(logger) == "a,b,step\r\n0.5,,0\r\n1.5,,1\r\n,2.5,2\r\n");
  CHECK(std::distance(std::filesystem::directory_iterator(logger.log_dir()), {}) == 1);
}

TEST_CASE("a folder that cannot be made is an error that names it", "[loggers]") {
  TempDir dir;
  lightning::write_file(dir.path("file"), "");
  CSVLogger logger(CSVLoggerOptions(dir.path("file")));
  CHECK_THROWS_WITH(logger.log_metrics({{"a", 1.0}}, 0),
                    Contains(dir.path("file")) && Contains("Not a directory"));
}

TEST_CASE("rows that were never saved are written when the logger goes", "[loggers]") {
  TempDir dir;
  std::string file;
  {
    CSVLogger logger(dir.path());
    for (int step = 0; step < 3; ++step) logger.log_metrics({{"a", step}}, step);
    file = logger.log_dir() + "/metrics.csv";
    CHECK_FALSE(std::filesystem::exists(file));
  }
  CHECK(read_file(file) == "a,step\r\n0.0,0\r\n1.0,1\r\n2.0,2\r\n");
}
