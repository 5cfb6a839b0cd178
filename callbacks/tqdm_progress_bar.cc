#include "callbacks/tqdm_progress_bar.h"

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "lightning/errors.h"
#include "lightning/registry.h"

namespace lightning {
namespace {

const Registration<Callback> kTQDMProgressBar{
    "TQDMProgressBar", "A bar for each epoch and evaluation, as tqdm draws it. The default.",
    [](const TQDMProgressBarOptions& options) {
      return std::make_shared<TQDMProgressBar>(options);
    }};

// The environment has its say: notebooks on Colab stall under frequent updates.
int64_t resolved_refresh_rate(int64_t given) {
  if (given < 0) {
    throw MisconfigurationError(str("TQDMProgressBar got refresh_rate ", given,
                                    ", expected the number of batches between two updates, or 0 "
                                    "for no bar."));
  }
  if (std::getenv("COLAB_GPU") != nullptr && given == 1) return 20;
  const char* least = std::getenv("TQDM_MINITERS");
  if (least == nullptr) return given;
  char* end = nullptr;
  const int64_t batches = std::strtoll(least, &end, 10);
  if (end == least || *end != '\0') {
    throw MisconfigurationError(str("The environment variable TQDM_MINITERS is \"", least,
                                    "\", expected a number of batches, as in TQDM_MINITERS=50."));
  }
  return std::max(batches, given);
}

LiveProgressBar::Pace pace_of(const TQDMProgressBarOptions& options) {
  if (options.process_position() < 0) {
    throw MisconfigurationError(str("TQDMProgressBar got process_position ",
                                    options.process_position(), ", expected 0 or more."));
  }
  LiveProgressBar::Pace pace;
  pace.every_n = resolved_refresh_rate(options.refresh_rate());
  pace.leave = options.leave();
  pace.position = static_cast<int>(2 * options.process_position());
  return pace;
}

}  // namespace

TQDMProgressBar::TQDMProgressBar(const TQDMProgressBarOptions& options)
    : LiveProgressBar(pace_of(options)),
      refresh_rate_(resolved_refresh_rate(options.refresh_rate())) {}

std::vector<std::string> TQDMProgressBar::render(const Frame& frame) const {
  std::vector<std::string> lines = {
      format_meter(frame.main->meter, format_postfix(frame.metrics), frame.width)};
  if (frame.nested != nullptr) {
    lines.push_back(format_meter(frame.nested->meter, "", frame.width));
  }
  return lines;
}

}  // namespace lightning
