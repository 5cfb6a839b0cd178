#include "loggers/summaries.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>
#include <png.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>

#include "loggers/protobuf.h"

namespace lightning::summaries {
namespace {

// Fields of Summary.Value.
constexpr uint32_t kTag = 1, kImage = 4, kHisto = 5, kTensor = 8, kMetadata = 9;

// A Summary of one value, whose tag comes first.
std::string summary(const std::string& tag, const std::string& rest) {
  std::string value, out;
  protobuf::text(value, kTag, tag);
  protobuf::bytes(out, 1, value + rest);
  return out;
}

// SummaryMetadata that hands the value to a plugin of TensorBoard.
std::string metadata(const std::string& plugin, const std::string& content) {
  std::string data, out;
  protobuf::text(data, 1, plugin);
  protobuf::text(data, 2, content);
  protobuf::bytes(out, 1, data);
  return out;
}

}  // namespace

std::string text(const std::string& tag, const std::string& text) {
  constexpr int64_t kString = 7;  // DT_STRING
  std::string dim, shape, tensor, value;
  protobuf::integer(dim, 1, 1);
  protobuf::bytes(shape, 2, dim);
  protobuf::integer(tensor, 1, kString);
  protobuf::bytes(tensor, 2, shape);
  protobuf::bytes(tensor, 8, text);
  protobuf::bytes(value, kTensor, tensor);
  protobuf::bytes(value, kMetadata, metadata("text", ""));
  return summary(tag + "/text_summary", value);
}

// ---- Histograms ---------------------------------------------------------------------------------

const std::vector<double>& default_bins() {
  static const std::vector<double> bins = [] {
    std::vector<double> positive;
    for (double v = 1e-12; v < 1e20; v *= 1.1) positive.push_back(v);
    std::vector<double> all;
    for (auto v = positive.rbegin(); v != positive.rend(); ++v) all.push_back(-*v);
    all.push_back(0);
    all.insert(all.end(), positive.begin(), positive.end());
    return all;
  }();
  return bins;
}

namespace {

void check_edges(const std::vector<double>& edges) {
  if (edges.size() < 2 || !std::is_sorted(edges.begin(), edges.end())) {
    throw MisconfigurationError(str("add_histogram got ", edges.size(),
                                    " edges of bins, expected two or more in ascending order."));
  }
}

std::vector<double> count(const double* values, size_t n, const std::vector<double>& edges) {
  std::vector<double> counts(edges.size() - 1, 0);
  for (size_t i = 0; i < n; ++i) {
    const double v = values[i];
    if (!(v >= edges.front() && v <= edges.back())) continue;  // nan, too
    const auto after = std::upper_bound(edges.begin(), edges.end(), v) - edges.begin();
    counts[std::min(static_cast<size_t>(after), edges.size() - 1) - 1] += 1;
  }
  return counts;
}

// Joins neighbours so that about `max_bins` remain.
void join_bins(size_t max_bins, std::vector<double>& counts, std::vector<double>& edges) {
  const size_t group = counts.size() / max_bins;
  std::vector<double> joined((counts.size() + group - 1) / group, 0);
  for (size_t i = 0; i < counts.size(); ++i) joined[i / group] += counts[i];
  std::vector<double> ends;
  for (size_t i = 0; i + 1 < edges.size(); i += group) ends.push_back(edges[i]);
  ends.push_back(edges.back());
  counts = std::move(joined);
  edges = std::move(ends);
}

}  // namespace

Histogram make_histogram(const at::Tensor& values, const std::vector<double>& edges_in,
                         int64_t max_bins) {
  check_edges(edges_in);
  const auto flat = values.detach().to(at::kCPU, at::kDouble).contiguous();
  const auto n = static_cast<size_t>(flat.numel());
  if (n == 0) throw MisconfigurationError("add_histogram got a tensor without elements.");
  const double* data = flat.const_data_ptr<double>();

  auto edges = edges_in;
  auto counts = count(data, n, edges);
  if (max_bins > 0 && counts.size() > static_cast<size_t>(max_bins)) {
    join_bins(static_cast<size_t>(max_bins), counts, edges);
  }
  const auto filled = [](double c) { return c > 0; };
  const auto first = std::find_if(counts.begin(), counts.end(), filled) - counts.begin();
  const auto last = std::find_if(counts.rbegin(), counts.rend(), filled).base() - counts.begin();
  if (last == 0) {
    throw MisconfigurationError(str("add_histogram found none of ", n, " values between ",
                                    edges.front(), " and ", edges.back(),
                                    "; are they nan or infinite?"));
  }
  Histogram out;
  out.counts.assign(1, first > 0 ? counts[static_cast<size_t>(first) - 1] : 0);
  out.counts.insert(out.counts.end(), counts.begin() + first, counts.begin() + last);
  out.limits.assign(edges.begin() + first, edges.begin() + last + 1);
  out.count = static_cast<double>(n);
  out.sum = std::accumulate(data, data + n, 0.0);
  out.sum_squares = std::inner_product(data, data + n, data, 0.0);
  const auto [low, high] = std::minmax_element(data, data + n);
  // Comparisons pass over nan, a sum does not.
  const bool nan = std::isnan(out.sum_squares);
  out.min = nan ? std::numeric_limits<double>::quiet_NaN() : *low;
  out.max = nan ? std::numeric_limits<double>::quiet_NaN() : *high;
  return out;
}

std::string histogram(const std::string& tag, const Histogram& histogram) {
  std::string histo, value;
  protobuf::number(histo, 1, histogram.min);
  protobuf::number(histo, 2, histogram.max);
  protobuf::number(histo, 3, histogram.count);
  protobuf::number(histo, 4, histogram.sum);
  protobuf::number(histo, 5, histogram.sum_squares);
  protobuf::packed_doubles(histo, 6, histogram.limits);
  protobuf::packed_doubles(histo, 7, histogram.counts);
  protobuf::bytes(value, kHisto, histo);
  return summary(tag, value);
}

// ---- Images -------------------------------------------------------------------------------------

namespace {

[[noreturn]] void refuse_image(const at::Tensor& image, const std::string& formats,
                               const std::string& expected) {
  std::vector<std::string> sizes;
  for (const auto size : image.sizes()) sizes.push_back(std::to_string(size));
  throw MisconfigurationError(str("add_image got a tensor [", join(sizes), "] with dataformats \"",
                                  formats, "\", expected ", expected, "."));
}

// N images side by side, at most 8 a row: [N, C, H, W] -> [C, rows * H, columns * W].
at::Tensor grid(const at::Tensor& images_NCHW) {
  const int64_t n = images_NCHW.size(0), height = images_NCHW.size(2), width = images_NCHW.size(3);
  const int64_t columns = std::min<int64_t>(n, 8);
  const int64_t rows = (n + columns - 1) / columns;
  auto canvas =
      at::zeros({images_NCHW.size(1), rows * height, columns * width}, images_NCHW.options());
  for (int64_t i = 0; i < n; ++i) {
    canvas.narrow(1, i / columns * height, height)
        .narrow(2, i % columns * width, width)
        .copy_(images_NCHW.select(0, i));
  }
  return canvas;
}

// As [H, W, C], uint8, contiguous, on the CPU, C 3 or 4.
at::Tensor to_pixels(const at::Tensor& given, const std::string& formats) {
  const std::string wanted = formats.size() == 4 ? "NCHW" : formats.size() == 3 ? "HWC" : "HW";
  std::vector<int64_t> order;
  for (const char dim : wanted) {
    const auto at = formats.find(dim);
    if (at == std::string::npos || given.dim() != static_cast<int64_t>(formats.size())) {
      refuse_image(given, formats, "one letter of N, C, H, W for each dim");
    }
    order.push_back(static_cast<int64_t>(at));
  }
  const bool bytes = given.scalar_type() == at::kByte;
  auto image = given.detach().to(at::kCPU).permute(order);
  if (!bytes) image = image.to(at::kFloat).mul(255).clamp(0, 255).nan_to_num(0).to(at::kByte);
  if (wanted == "NCHW" && image.size(0) > 0) image = grid(image).permute({1, 2, 0});
  if (wanted == "HW") image = image.unsqueeze(2);
  const auto channels = image.size(2);
  if (image.dim() != 3 || (channels != 1 && channels != 3 && channels != 4) || image.numel() == 0) {
    refuse_image(given, formats, "pixels, of 1, 3 or 4 channels");
  }
  if (channels == 1) image = image.expand({-1, -1, 3});
  return image.contiguous();
}

std::string encode_png(const at::Tensor& pixels_HWC) {
  png_image png;
  std::memset(&png, 0, sizeof(png));
  png.version = PNG_IMAGE_VERSION;
  png.height = static_cast<png_uint_32>(pixels_HWC.size(0));
  png.width = static_cast<png_uint_32>(pixels_HWC.size(1));
  png.format = pixels_HWC.size(2) == 4 ? PNG_FORMAT_RGBA : PNG_FORMAT_RGB;
  std::string out(PNG_IMAGE_PNG_SIZE_MAX(png), '\0');
  png_alloc_size_t size = out.size();
  if (png_image_write_to_memory(&png, out.data(), &size, 0, pixels_HWC.const_data_ptr<uint8_t>(), 0,
                                nullptr) == 0) {
    throw std::runtime_error(str("libpng cannot encode an image of ", png.width, " x ", png.height,
                                 " pixels: ", png.message, "."));
  }
  out.resize(size);
  return out;
}

}  // namespace

std::string image(const std::string& tag, const at::Tensor& image, const std::string& dataformats) {
  std::string formats = dataformats;
  std::transform(formats.begin(), formats.end(), formats.begin(),
                 [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
  const auto pixels = to_pixels(image, formats);
  std::string encoded, value;
  protobuf::integer(encoded, 1, pixels.size(0));
  protobuf::integer(encoded, 2, pixels.size(1));
  protobuf::integer(encoded, 3, pixels.size(2));
  protobuf::bytes(encoded, 4, encode_png(pixels));
  protobuf::bytes(value, kImage, encoded);
  return summary(tag, value);
}

// ---- Hyper-parameters ---------------------------------------------------------------------------

namespace {

constexpr const char* kPlugin = "hparams";

// google.protobuf.Value. A bool is a number, as torch.utils.tensorboard writes it: to Python a bool
// is an int.
std::string value_of(const std::string& key, const Json& value) {
  std::string out;
  if (value.is_string()) {
    protobuf::bytes(out, 3, value.get<std::string>());
  } else if (value.is_boolean()) {
    protobuf::number_always(out, 2, value.get<bool>() ? 1 : 0);
  } else if (value.is_number()) {
    protobuf::number_always(out, 2, value.get<double>());
  } else {
    throw MisconfigurationError(str("The hyper-parameter \"", key, "\" is ", value.dump(),
                                    ", expected a number, bool or string; sanitize_hparams makes "
                                    "the others so."));
  }
  return out;
}

std::string hparam_info(const std::string& key, const Json& value, const Json& domain) {
  constexpr int64_t kString = 1, kFloat64 = 3;  // DataType
  std::string info;
  protobuf::text(info, 1, key);
  protobuf::integer(info, 4, value.is_string() ? kString : kFloat64);
  if (domain.is_object() && domain.contains(key)) {
    std::string values;
    for (const auto& one : domain.at(key)) {
      if (one.is_string() != value.is_string()) {
        throw MisconfigurationError(str("The domain of the hyper-parameter \"", key, "\" holds ",
                                        one.dump(), ", expected values like ", value.dump(), "."));
      }
      protobuf::bytes(values, 1, value_of(key, one));
    }
    protobuf::bytes(info, 5, values);
  }
  return info;
}

std::string hparams_summary(const std::string& tag, uint32_t field, const std::string& message) {
  std::string data, value;
  protobuf::bytes(data, field, message);
  protobuf::bytes(value, kMetadata, metadata(kPlugin, data));
  return summary(tag, value);
}

}  // namespace

std::vector<std::string> hparams(const Json& hparams, const std::vector<std::string>& metrics,
                                 const Json& discrete_domain) {
  constexpr int64_t kSuccess = 1;  // Status
  std::string experiment, start, end;
  for (const auto& [key, value] : hparams.items()) {
    if (value.is_null()) continue;
    std::string entry;
    protobuf::bytes(entry, 1, key);
    protobuf::bytes(entry, 2, value_of(key, value));
    protobuf::bytes(start, 1, entry);
    protobuf::bytes(experiment, 4, hparam_info(key, value, discrete_domain));
  }
  for (const auto& metric : metrics) {
    std::string name, info;
    protobuf::text(name, 2, metric);
    protobuf::bytes(info, 1, name);
    protobuf::bytes(experiment, 5, info);
  }
  protobuf::integer(end, 1, kSuccess);
  return {hparams_summary("_hparams_/experiment", 2, experiment),
          hparams_summary("_hparams_/session_start_info", 3, start),
          hparams_summary("_hparams_/session_end_info", 4, end)};
}

}  // namespace lightning::summaries
