// A disk that is slow, full or where the process ends, for tests of what is safe when: this test
// program's own pwrite(), fsync(), rename() and renameat2() stand in the place of the system's.
//
//   disk().before = [](const char* call) { return 0; };   errno for an error, 0 to go on
//
// Called from any thread that writes or syncs a file, or gives it its name.
#pragma once

#include <functional>

namespace lightning::testing {

struct Disk {
  std::function<int(const char* call)> before;
};
Disk& disk();

}  // namespace lightning::testing
