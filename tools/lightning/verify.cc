#include "tools/lightning/verify.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <set>
#include <variant>

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

// What a Trainer's strategies alone name like this.
bool has_trainer_optimizers(const DcpMetadata& metadata) {
  return std::any_of(metadata.items.begin(), metadata.items.end(), [](const auto& item) {
    const auto* first = item.path.empty() ? nullptr : std::get_if<std::string>(&item.path[0]);
    return first != nullptr && *first == "optimizer_0";
  });
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
  const auto values = path + "/" + kFolderValues;
  if (::access(values.c_str(), F_OK) == 0) {
    verify_torch_file(values, result);
    return;
  }
  if (has_trainer_optimizers(reader.metadata())) {
    throw CheckpointError(str(
        "The folder holds the model and the optimizers of a Trainer checkpoint, but not its file ",
        kFolderValues, ", which says how far the run was: fit cannot resume from it. Copy ",
        kFolderValues,
        " from where the folder came from, or load the weights and start a new run."));
  }
  result.note = str("without ", kFolderValues, ": values to load, no run to resume");
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
