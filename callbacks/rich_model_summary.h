// ModelSummary in a table with lines around its cells, its header in colour:
//
//   ┏━━━┳━━━━━━┳━━━━━━━━━━━━┳━━━━━━━━┳━━━━━━━┳━━━━━━━┓
//   ┃   ┃ Name ┃ Type       ┃ Params ┃ Mode  ┃ FLOPs ┃
//   ┡━━━╇━━━━━━╇━━━━━━━━━━━━╇━━━━━━━━╇━━━━━━━╇━━━━━━━┩
//   │ 0 │ net  │ Sequential │  132 K │ train │     0 │
//   └───┴──────┴────────────┴────────┴───────┴───────┘
//
// Registered as "RichModelSummary". Without colours where the output is no terminal. Names and
// types that make the table wider than the terminal are cut.
// Source: Lightning 2.6, `RichModelSummary`; rich 15.
#pragma once

#include <string>

#include "callbacks/model_summary.h"
#include "lightning/style.h"

namespace lightning {

struct RichModelSummaryOptions : Options<RichModelSummaryOptions> {
  OPTION(int64_t, max_depth, 1, "Levels of submodules to show; -1 for all, 0 for no summary.");
  OPTION(std::string, header_style, "bold magenta", "Style of the header, as rich writes styles.");
};

class RichModelSummary : public ModelSummary {
 public:
  // Errors: MisconfigurationError for max_depth < -1 or a header_style that is none.
  explicit RichModelSummary(const RichModelSummaryOptions& options = {});

 protected:
  std::string format(const Summary& summary) const override;

 private:
  Style header_;
};

//   width   columns of the terminal; 0 for no limit
std::string format_rich_summary(const Summary& summary, const Style& header, int width,
                                ColorSystem colors);

}  // namespace lightning
