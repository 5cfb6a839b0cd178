#include "lightning/files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <stdexcept>

#include "lightning/errors.h"

namespace lightning {
namespace {

[[noreturn]] void fail(const std::string& what, const std::string& path, int reason) {
  std::string advice;
  if (reason == ENOSPC || reason == EDQUOT) advice = " Free some space, or write elsewhere.";
  if (reason == EACCES || reason == EPERM || reason == EROFS || reason == ENOTDIR) {
    advice = " Give a folder that this user may write to.";
  }
  throw std::runtime_error(
      str("Cannot ", what, " ", path, ": ", std::strerror(reason), ".", advice));
}

// Closes at the end of its scope.
class File {
 public:
  File(const std::string& path, int flags, const char* what)
      : fd_(::open(path.c_str(), flags | O_CLOEXEC, 0666)) {
    if (fd_ < 0) fail(what, path, errno);
  }
  ~File() {
    if (fd_ >= 0) ::close(fd_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int fd() const { return fd_; }
  // Some file systems (NFS) report a failed write only here.
  int close() {
    const int rc = ::close(fd_);
    fd_ = -1;
    return rc;
  }

 private:
  int fd_;
};

// The end of the name that starts at `begin`, letters, digits and underscores.
size_t name_end(const std::string& text, size_t begin) {
  size_t end = begin;
  while (end < text.size() &&
         (std::isalnum(static_cast<unsigned char>(text[end])) || text[end] == '_')) {
    ++end;
  }
  return end;
}

}  // namespace

std::string expand_path(const std::string& path) {
  std::string out;
  size_t i = 0;
  const char* home = std::getenv("HOME");
  if (home != nullptr && !path.empty() && path[0] == '~' && (path.size() == 1 || path[1] == '/')) {
    out = home;
    i = 1;
  }
  while (i < path.size()) {
    const bool braces = path.compare(i, 2, "${") == 0;
    const size_t begin = i + (braces ? 2 : 1);
    const size_t end = path[i] == '$' ? name_end(path, begin) : begin;
    const bool closed = !braces || (end < path.size() && path[end] == '}');
    const char* value = path[i] == '$' && end > begin && closed
                            ? std::getenv(path.substr(begin, end - begin).c_str())
                            : nullptr;
    if (value == nullptr) {
      out += path[i++];
      continue;
    }
    out += value;
    i = end + (braces ? 1 : 0);
  }
  return out;
}

bool path_exists(const std::string& path) {
  struct stat found {};
  return ::lstat(path.c_str(), &found) == 0;
}

bool folder_exists(const std::string& path) {
  struct stat found {};
  return ::stat(path.c_str(), &found) == 0 && S_ISDIR(found.st_mode);
}

void make_directories(const std::string& path) {
  std::error_code error;
  std::filesystem::create_directories(path.empty() ? "." : path, error);
  if (error) fail("create the folder", path, error.value());
}

std::string read_file(const std::string& path) {
  const File file(path, O_RDONLY, "read");
  std::string text;
  char chunk[1 << 16];
  for (;;) {
    const ssize_t n = ::read(file.fd(), chunk, sizeof(chunk));
    if (n == 0) return text;
    if (n > 0) {
      text.append(chunk, static_cast<size_t>(n));
    } else if (errno != EINTR) {
      fail("read", path, errno);
    }
  }
}

void append_all(int fd, const std::string& text, const std::string& path) {
  const off_t before = ::lseek(fd, 0, SEEK_END);
  size_t done = 0;
  while (done < text.size()) {
    const ssize_t n = ::write(fd, text.data() + done, text.size() - done);
    if (n >= 0) {
      done += static_cast<size_t>(n);
    } else if (errno != EINTR) {
      const int reason = errno;
      if (before >= 0 && ::ftruncate(fd, before) == 0) ::lseek(fd, before, SEEK_SET);
      fail("write to", path, reason);
    }
  }
}

void append_file(const std::string& path, const std::string& text) {
  File file(path, O_WRONLY | O_CREAT | O_APPEND, "write to");
  append_all(file.fd(), text, path);
  if (file.close() != 0) fail("write to", path, errno);
}

void write_file(const std::string& path, const std::string& text) {
  const std::string unfinished = str(path, ".", ::getpid(), ".tmp");
  try {
    File file(unfinished, O_WRONLY | O_CREAT | O_TRUNC, "write");
    append_all(file.fd(), text, unfinished);
    if (file.close() != 0) fail("write", path, errno);
    if (::rename(unfinished.c_str(), path.c_str()) != 0) fail("write", path, errno);
  } catch (...) {
    ::unlink(unfinished.c_str());
    throw;
  }
}

}  // namespace lightning
