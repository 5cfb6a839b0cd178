// Folders while a sharded checkpoint is written into them: NAME.unfinished, which becomes NAME when
// all is there. Who is killed meanwhile leaves it behind.
#pragma once

#include <cstdint>
#include <string>

#include "lightning/scope.h"

namespace lightning {

// The name under which a folder is written.
std::string unfinished_folder(const std::string& path);

// Makes the folder, where it is not there, and holds a lock on it (flock) that ends with the scope
// or with this process. File systems without such locks give none.
// Errors: those of make_directories().
Scope hold_folder(const std::string& path);

// Deletes what killed processes left in a folder: folders of that name which nobody holds, with
// nothing in them but parts of a sharded checkpoint. Where the file system has no locks they stay,
// until a save of their name. A folder that is not there has none. Gives their number.
// Errors: CheckpointError for one that cannot be deleted.
int64_t remove_unfinished_folders(const std::string& folder);

}  // namespace lightning
