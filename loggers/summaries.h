// TensorBoard's Summary messages, encoded, as torch.utils.tensorboard makes them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "lightning/fwd.h"
#include "lightning/options.h"

namespace lightning::summaries {

// Markdown for the text tab; its tag gets "/text_summary".
std::string text(const std::string& tag, const std::string& text);

// The default bins of torch.utils.tensorboard: 0 and ±1e-12 · 1.1^k up to 1e20.
const std::vector<double>& default_bins();

// What a histogram shows. `limits[i]` is the right end of `counts[i]`; bins beyond the first and
// last that hold anything are left out, but for an empty one that gives the first its left end.
struct Histogram {
  double min = 0, max = 0, count = 0, sum = 0, sum_squares = 0;
  std::vector<double> limits;
  std::vector<double> counts;
};

//   values     any shape, dtype that converts to double, and device
//   edges      ascending; a bin takes its left end, the last one both; values outside count nowhere
//   max_bins   neighbours are joined where there are more; 0: as many as there are
// Errors: MisconfigurationError for an empty tensor, no value inside the bins, or bad edges.
Histogram make_histogram(const at::Tensor& values, const std::vector<double>& edges,
                         int64_t max_bins);
std::string histogram(const std::string& tag, const Histogram& histogram);

//   image         uint8 in 0 to 255, or another dtype in 0 to 1, clipped; on any device
//   dataformats   the meaning of each dim: "CHW", "HWC", "HW"; "NCHW" makes a grid, 8 a row. C is
//                 1 (grey), 3 (RGB) or 4 (RGBA)
// Errors: MisconfigurationError for a shape that does not fit.
std::string image(const std::string& tag, const at::Tensor& image, const std::string& dataformats);

// What the hparams tab wants: the experiment, the start and the end of a session.
//
//   hparams           a flat map of numbers, bools and strings; null is left out
//   metrics           tags of scalars
//   discrete_domain   for some of the hparams, the list of values they may take; may be null
// Errors: MisconfigurationError for other values.
std::vector<std::string> hparams(const Json& hparams, const std::vector<std::string>& metrics,
                                 const Json& discrete_domain);

}  // namespace lightning::summaries
