#include "callbacks/plain_progress_bar.h"

#include <memory>

#include "lightning/errors.h"
#include "lightning/registry.h"

namespace lightning {
namespace {

const Registration<Callback> kPlainProgressBar{
    "PlainProgressBar", "A readable line at intervals and at the end of each epoch, for log files.",
    [](const PlainProgressBarOptions& options) {
      return std::make_shared<PlainProgressBar>(options);
    }};

LiveProgressBar::Pace pace_of(const PlainProgressBarOptions& options) {
  if (!(options.interval() > 0)) {
    throw MisconfigurationError(str("PlainProgressBar got interval ", options.interval(),
                                    ", expected seconds above 0, as in interval(10)."));
  }
  if (options.refresh_rate() < 0) {
    throw MisconfigurationError(str("PlainProgressBar got refresh_rate ", options.refresh_rate(),
                                    ", expected a number of batches, or 0 for no lines."));
  }
  LiveProgressBar::Pace pace;
  pace.every_n = options.refresh_rate();
  pace.line_interval = options.interval();
  pace.lines = true;
  return pace;
}

}  // namespace

PlainProgressBar::PlainProgressBar(const PlainProgressBarOptions& options)
    : LiveProgressBar(pace_of(options)) {}

}  // namespace lightning
