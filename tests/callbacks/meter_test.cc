#include "callbacks/meter.h"

#include <catch2/catch.hpp>
#include <limits>
#include <string>
#include <vector>

#include "lightning/terminal.h"
#include "tests/support/python.h"

using namespace lightning;

namespace {

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == separator) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

// Two thousand bars of all kinds, as tqdm draws them with Lightning's layout.
constexpr const char* kMeters = R"(
import random
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm, TQDMProgressBar
random.seed(3)
for i in range(2000):
    total = random.choice([None, 0, 1, 4, 10, 469, 1095, 123456])
    n = random.choice([0, 1, random.randint(0, total or 50), total or 7, (total or 5) + random.choice([0, 1])])
    initial = random.choice([0, 0, min(n, 3)])
    elapsed = random.choice([0.0, 0.004, random.random(), 59.96, random.random() * 100,
                             random.random() * 10000, random.random() * 400000])
    ncols = random.choice([1, 7, 20, 40, 79, 80, 79, 100, 119, 203, None])
    desc = random.choice(['', 'Epoch 0', 'Epoch 117', 'Validation DataLoader 1', '学習 3'])
    postfix = random.choice(['', 'v_num=0', 'v_num=0, tl=0.141', 'train_loss_step=0.123, accuracy=0.975'])
    text = Tqdm.format_meter(n, total, elapsed, ncols=ncols, prefix=desc, postfix=postfix,
                             initial=initial, bar_format=TQDMProgressBar.BAR_FORMAT)
    print(n, total, initial, repr(elapsed), ncols or 0, desc, postfix, text, sep='\t')
)";

constexpr const char* kNumbers = R"(
import random, struct
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
random.seed(5)
f32 = lambda x: struct.unpack('f', struct.pack('f', x))[0]
values = [0.0, 1.0, -1.0, 0.5, 0.25, 100.0, 999.5, 1000.0, 1234.0, 12345.0, 99999.0, 1e5, 1e6, 1.5e10,
          1e16, 1e22, 1e-3, 1e-4, 1.23e-5, 1e-10, 1e-100, 3.0e38, -0.00123, 2.0 / 3, 0.1]
values += [f32(random.uniform(-2, 2)) for _ in range(300)]
values += [f32(random.uniform(-1, 1) * 10 ** random.randint(-12, 12)) for _ in range(700)]
for v in values:
    print('f', repr(v), Tqdm.format_num(v), sep='\t')
for v in [0, 1, 7, 10, 999, 1000, 99999, 100000, 1234567, 12345678901, -5]:
    print('i', v, Tqdm.format_num(v), sep='\t')
)";

}  // namespace

TEST_CASE("a bar is the text that tqdm gives it", "[callbacks][python]") {
  int cases = 0;
  for (const auto& line : split(testing::run_python(kMeters), '\n')) {
    if (line.empty()) continue;
    const auto parts = split(line, '\t');
    REQUIRE(parts.size() == 8);
    Meter meter;
    meter.n = std::stoll(parts[0]);
    if (parts[1] != "None") meter.total = std::stoll(parts[1]);
    meter.initial = std::stoll(parts[2]);
    meter.elapsed = std::stod(parts[3]);
    meter.description = parts[5];
    INFO(line);
    CHECK(format_meter(meter, parts[6], std::stoi(parts[4])) == parts[7]);
    ++cases;
  }
  CHECK(cases == 2000);
}

TEST_CASE("metrics beside the bar are printed as the original prints them", "[callbacks][python]") {
  for (const auto& line : split(testing::run_python(kNumbers), '\n')) {
    if (line.empty()) continue;
    const auto parts = split(line, '\t');
    INFO(line);
    if (parts[0] == "f") {
      CHECK(format_metric(std::stod(parts[1])) == parts[2]);
    } else {
      const int64_t value = std::stoll(parts[1]);
      CHECK(format_postfix({{"n", value}}) == "n=" + parts[2]);
    }
  }
}

TEST_CASE("metrics that are no number stay legible", "[callbacks]") {
  // The original pads them like numbers, "nan.0".
  CHECK(format_metric(std::numeric_limits<double>::quiet_NaN()) == "nan");
  CHECK(format_metric(-std::numeric_limits<double>::infinity()) == "-inf");
  CHECK(format_postfix({{"v_num", std::string("a1b2")}, {"tl", 0.5}}) == "v_num=a1b2, tl=0.500");
  CHECK(format_postfix({}) == "");
}

TEST_CASE("a line for a log file has everything but the bar", "[callbacks]") {
  Meter meter;
  meter.description = "Epoch 0";
  meter.n = 3;
  meter.total = 4;
  meter.elapsed = 90;
  CHECK(format_meter_line(meter, "tl=0.141") ==
        "Epoch 0:  75% 3/4 [01:30<00:30,  0.03it/s, tl=0.141]");
  meter.total.reset();
  CHECK(format_meter_line(meter, "") == "Epoch 0: 3/? [01:30<00:00,  0.03it/s]");
}

TEST_CASE("times longer than an hour show hours", "[callbacks]") {
  CHECK(format_interval(0) == "00:00");
  CHECK(format_interval(59.99) == "00:59");
  CHECK(format_interval(3600) == "1:00:00");
  CHECK(format_interval(90061) == "25:01:01");
}
