#include "lightning/checkpoint/consolidate.h"

#include <utility>

#include "lightning/checkpoint/checkpoint_file.h"
#include "lightning/checkpoint/dcp.h"
#include "lightning/checkpoint/migration.h"
#include "lightning/checkpoint/scalar_type.h"
#include "lightning/checkpoint/torch_file.h"
#include "lightning/errors.h"
#include "lightning/files.h"

namespace lightning {
namespace {

using Item = DcpMetadata::Item;

void check(const std::string& folder, const std::string& file, bool overwrite) {
  if (detect_format(folder) != CheckpointFormat::kSharded) {
    throw CheckpointError(str("Cannot consolidate ", folder,
                              ": it is one file already. Give a folder that "
                              "torch.distributed.checkpoint or a sharded run wrote."));
  }
  if (folder_exists(file)) {
    throw CheckpointError(
        str("The output ", file, " is a folder, which a file does not replace. Give a file."));
  }
  if (path_exists(file) && !overwrite) {
    throw CheckpointError(str("The output ", file,
                              " exists. Move it away, give another file, or allow to overwrite "
                              "it."));
  }
}

}  // namespace

std::string consolidated_name(const std::string& folder) {
  auto name = folder;
  while (name.size() > 1 && name.back() == '/') name.pop_back();
  return name + ".consolidated";
}

void consolidate_checkpoint(const std::string& folder, const std::string& file,
                            const ConsolidateOptions& options) {
  check(folder, file, options.overwrite);
  const DcpReader reader(folder);
  DistantTensors distant;
  State state = reader.tree([&](const Item& item) -> State {
    if (!item.is_tensor) return reader.read_value(item.fqn);
    return distant.add(item.sizes, scalar_type(item.dtype),
                       [&reader, name = item.fqn](uint64_t offset, uint64_t bytes, void* to) {
                         reader.read_bytes(name, offset, bytes, to);
                       });
  });
  add_folder_values(state, folder);
  if (options.as_trainer) {
    state = as_trainer_checkpoint(std::move(state), CheckpointFormat::kSharded);
    migrate_checkpoint(state, folder);
  }
  write_torch_file(state, file, &distant);
}

}  // namespace lightning
