// Progress as lines of text, for log files and for terminals that nobody watches:
//
//   Epoch 0:  75% 300/400 [00:30<00:10, 10.01it/s, v_num=0, train_loss=0.141]
//
// Registered as "PlainProgressBar". A line at intervals and one at the end of each epoch and
// evaluation. The other bars write the same where stdout is no terminal. Silent on ranks other
// than 0.
#pragma once

#include <string>
#include <vector>

#include "callbacks/live_progress_bar.h"
#include "lightning/options.h"

namespace lightning {

struct PlainProgressBarOptions : Options<PlainProgressBarOptions> {
  OPTION(double, interval, 10.0, "Least seconds between two lines within an epoch. Above 0.");
  OPTION(int64_t, refresh_rate, 1, "Batches between two looks at the clock; 0 for no lines.");
};

class PlainProgressBar : public LiveProgressBar {
 public:
  // Errors: MisconfigurationError for an interval that is not above 0 or a negative refresh_rate.
  explicit PlainProgressBar(const PlainProgressBarOptions& options = {});

 protected:
  std::vector<std::string> render(const Frame&) const override { return {}; }
};

}  // namespace lightning
