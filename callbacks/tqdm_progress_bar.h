// The default bar, as tqdm draws it:
//
//   Epoch 0:  75%|███████▌  | 3/4 [00:00<00:00, 93.54it/s, v_num=0, tl=0.141]
//   Validation DataLoader 0:  50%|█████     | 1/2 [00:00<00:00, 310.09it/s]
//
// Registered as "TQDMProgressBar". One line serves all epochs; the line of a validation stands
// below while it runs. Silent on ranks other than 0; see live_progress_bar.h for when it draws.
// Source: Lightning 2.6, `TQDMProgressBar`.
#pragma once

#include <string>
#include <vector>

#include "callbacks/live_progress_bar.h"
#include "lightning/options.h"

namespace lightning {

struct TQDMProgressBarOptions : Options<TQDMProgressBarOptions> {
  OPTION(
      int64_t, refresh_rate, 1,
      "Batches between two updates, at most ten updates a second; 0 for no bar. The environment's "
      "TQDM_MINITERS raises it.");
  OPTION(int64_t, process_position, 0, "Twice this many lines below the cursor is where it draws.");
  OPTION(bool, leave, false, "Whether the bar of each epoch stays on the terminal.");
};

class TQDMProgressBar : public LiveProgressBar {
 public:
  // Errors: MisconfigurationError for a negative refresh_rate or process_position.
  explicit TQDMProgressBar(const TQDMProgressBarOptions& options = {});

  int64_t refresh_rate() const { return refresh_rate_; }

 protected:
  std::vector<std::string> render(const Frame& frame) const override;

 private:
  int64_t refresh_rate_;
};

}  // namespace lightning
