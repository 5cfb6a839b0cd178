#include "tools/lightning/verify.h"

#include <sys/stat.h>

#include <algorithm>
#include <set>

#include "lightning/checkpoint/checkpoint_file.h"
#include "lightning/checkpoint/dcp.h"
#include "lightning/checkpoint/mapped_file.h"
#include "lightning/checkpoint/safetensors.h"
#include "lightning/checkpoint/torch_file.h"
#include "lightning/checkpoint/zip_reader.h"
#include "lightning/errors.h"
#include "tools/lightning/checkpoint_view.h"

namespace lightning::tools {
namespace {

uint64_t bytes_on_disk(const std::string& path) {
  struct stat found {};
  return ::stat(path.c_str(), &found) == 0 ? static_cast<uint64_t>(found.st_size) : 0;
}

void verify_torch_file(const std::string& path, Verified& result) {
  const State state = read_torch_file(path, true);
  TensorTotals totals;
  totals.add(state);
  result.tensors += totals.tensors;
  result.bytes += bytes_on_disk(path);
  const ZipReader zip(MappedFile::open(path));
  for (const auto& record : zip.records()) result.crcs += record.crc != 0 ? 1 : 0;
}

void verify_folder(const std::string& path, Verified& result) {
  const DcpReader reader(path);
  std::set<std::string> files = {".metadata"};
  for (const auto& item : reader.metadata().items) {
    if (!item.is_tensor) {
      reader.read_value(item.fqn);
      files.insert(item.place.file);
      ++result.crcs;
      continue;
    }
    ++result.tensors;
    for (const auto& chunk : item.chunks) {
      reader.read(item.fqn, chunk.offsets, chunk.sizes);
      if (chunk.place.file.empty()) continue;
      files.insert(chunk.place.file);
      ++result.crcs;
    }
  }
  for (const auto& file : files) result.bytes += bytes_on_disk(path + "/" + file);
  if (bytes_on_disk(path + "/meta.pt") > 0) verify_torch_file(path + "/meta.pt", result);
}

}  // namespace

Verified verify_checkpoint(const std::string& path) {
  Verified result;
  const auto format = detect_format(path);
  result.format = to_string(format);
  switch (format) {
    case CheckpointFormat::kTorch:
      verify_torch_file(path, result);
      break;
    case CheckpointFormat::kSafetensors:
      result.tensors = read_safetensors_header(path, true).entries.size();
      result.bytes = bytes_on_disk(path);
      break;
    case CheckpointFormat::kSharded:
      verify_folder(path, result);
      break;
  }
  check_mapped_files();
  return result;
}

}  // namespace lightning::tools
