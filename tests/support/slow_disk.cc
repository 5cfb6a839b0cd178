#include "tests/support/slow_disk.h"

#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

namespace lightning::testing {
namespace {

// Whether the call is to be made.
bool goes_on(const char* call) {
  const auto& before = disk().before;
  const int error = before ? before(call) : 0;
  if (error != 0) errno = error;
  return error == 0;
}

}  // namespace

Disk& disk() {
  static Disk instance;
  return instance;
}

}  // namespace lightning::testing

extern "C" {

int fsync(int fd) {
  if (!lightning::testing::goes_on("fsync")) return -1;
  return static_cast<int>(::syscall(SYS_fsync, fd));
}

ssize_t pwrite(int fd, const void* data, size_t bytes, off_t offset) {
  if (!lightning::testing::goes_on("pwrite")) return -1;
  return ::syscall(SYS_pwrite64, fd, data, bytes, offset);
}

int rename(const char* from, const char* to) noexcept {
  if (!lightning::testing::goes_on("rename")) return -1;
  return static_cast<int>(::syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0));
}

int renameat2(int from_folder, const char* from, int to_folder, const char* to,
              unsigned int flags) noexcept {
  if (!lightning::testing::goes_on("renameat2")) return -1;
  return static_cast<int>(::syscall(SYS_renameat2, from_folder, from, to_folder, to, flags));
}

}  // extern "C"
