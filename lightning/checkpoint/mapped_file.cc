#include "lightning/checkpoint/mapped_file.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>

#include "lightning/errors.h"

namespace lightning {
namespace {

// The mapped ranges, for the signal handler, which may take no lock: it reads atomics of a table
// that never moves. Everyone else changes the table under mutex(). `version` is odd while a slot
// changes hands, so the handler never puts the begin of one file together with the end of another.
struct Slot {
  std::atomic<uint32_t> version{0};
  std::atomic<uintptr_t> begin{0};
  std::atomic<uintptr_t> end{0};  // 0: free
  std::atomic<const char*> path{nullptr};
  std::atomic<bool> torn{false};
};
static_assert(std::atomic<uintptr_t>::is_always_lock_free, "read by a signal handler");

// More files than this at once are read instead of mapped.
constexpr int kSlots = 4096;
Slot slots[kSlots];
// Slots from here on were never used: the handler looks no further.
std::atomic<int> used_slots{0};
uintptr_t page_bytes = 4096;
struct sigaction earlier_handler {};

std::mutex& mutex() {
  static std::mutex* const one = new std::mutex;  // outlives the files of static objects
  return *one;
}

Slot* slot_of(uintptr_t address) {
  const int used = used_slots.load(std::memory_order_acquire);
  for (Slot* slot = slots; slot < slots + used; ++slot) {
    const uint32_t before = slot->version.load();
    const bool inside = address >= slot->begin.load() && address < slot->end.load();
    if (inside && before % 2 == 0 && slot->version.load() == before) return slot;
  }
  return nullptr;
}

// printf is not allowed in a handler.
void say_torn(const char* path) {
  constexpr char kBegin[] = "lightning: ";
  constexpr char kEnd[] =
      " was cut short by another program while it was read, or the disk failed; zeros stand for "
      "what is gone.\n";
  char text[4400];
  char* next = text;
  const auto add = [&next](const char* part, size_t bytes) {
    std::memcpy(next, part, bytes);
    next += bytes;
  };
  add(kBegin, sizeof(kBegin) - 1);
  add(path, std::min<size_t>(std::strlen(path), 4096));
  add(kEnd, sizeof(kEnd) - 1);
  if (::write(STDERR_FILENO, text, static_cast<size_t>(next - text)) < 0) {
    return;  // there is nobody else to tell
  }
}

bool put_zeros(const Slot& slot, uintptr_t address) {
  const uintptr_t page = address - address % page_bytes;
  const auto map = [page](uintptr_t end) {
    return ::mmap(reinterpret_cast<void*>(page), end - page, PROT_READ | PROT_WRITE,
                  MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) != MAP_FAILED;
  };
  // A process may have 65,530 mappings. Pages side by side become one, others may use them up; then
  // all that is behind this page goes with it.
  return map(page + page_bytes) || map(slot.end.load());
}

void pass_on(int signal, siginfo_t* about, void* context) {
  if ((earlier_handler.sa_flags & SA_SIGINFO) != 0) {
    earlier_handler.sa_sigaction(signal, about, context);
    return;
  }
  const bool sent = about->si_code <= 0;  // by kill(), not by touching memory
  if (earlier_handler.sa_handler == SIG_IGN && sent) return;
  if (earlier_handler.sa_handler != SIG_IGN && earlier_handler.sa_handler != SIG_DFL) {
    earlier_handler.sa_handler(signal);
    return;
  }
  struct sigaction standard {};
  standard.sa_handler = SIG_DFL;
  ::sigaction(signal, &standard, nullptr);
  // The instruction that failed runs again and ends the program; a signal that was sent must be
  // sent again, and arrives when this handler returns.
  if (sent) ::raise(signal);
}

void on_sigbus(int signal, siginfo_t* about, void* context) {
  const int kept_errno = errno;
  const auto address = reinterpret_cast<uintptr_t>(about->si_addr);
  Slot* const slot = about->si_code > 0 ? slot_of(address) : nullptr;
  if (slot == nullptr || !put_zeros(*slot, address)) {
    pass_on(signal, about, context);
  } else if (!slot->torn.exchange(true)) {
    say_torn(slot->path.load());
  }
  errno = kept_errno;
}

void install_handler() {
  static const bool installed = [] {
    page_bytes = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
    ::sigaction(SIGBUS, nullptr, &earlier_handler);
    struct sigaction ours {};
    ours.sa_sigaction = on_sigbus;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
    sigemptyset(&ours.sa_mask);
    return ::sigaction(SIGBUS, &ours, nullptr) == 0;
  }();
  static_cast<void>(installed);
}

// -1 when the table is full.
int take_slot(const void* data, uint64_t bytes, const char* path) {
  const std::lock_guard<std::mutex> lock(mutex());
  install_handler();
  for (int i = 0; i < kSlots; ++i) {
    Slot& slot = slots[i];
    if (slot.end.load() != 0) continue;
    slot.version++;
    slot.begin = reinterpret_cast<uintptr_t>(data);
    slot.end = reinterpret_cast<uintptr_t>(data) + bytes;
    slot.path = path;
    slot.torn = false;
    slot.version++;
    used_slots = std::max(used_slots.load(), i + 1);
    return i;
  }
  return -1;
}

void free_slot(int i) {
  const std::lock_guard<std::mutex> lock(mutex());
  Slot& slot = slots[i];
  slot.version++;
  slot.end = 0;
  slot.begin = 0;
  slot.version++;
}

[[noreturn]] void refuse_torn(const std::string& path) {
  throw CheckpointError(
      str("The file ", path,
          " was cut short by another program while it was read, or the disk failed; what was read "
          "from there is zeros and must not be used. Bring the file back and load it again."));
}

[[noreturn]] void fail(const std::string& path, int reason) {
  const char* advice = reason == ENOENT   ? " Check the path."
                       : reason == EACCES ? " Give this user the right to read it."
                       : reason == ENOMEM ? " Free memory, or allow more by `ulimit -v`."
                                          : "";
  throw CheckpointError(str("Cannot read ", path, ": ", std::strerror(reason), ".", advice));
}

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd(fd) {}
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  const int fd;
};

void read_all(int fd, uint8_t* data, uint64_t bytes, const std::string& path) {
  uint64_t done = 0;
  while (done < bytes) {
    const size_t next = std::min<uint64_t>(bytes - done, uint64_t{1} << 30);
    const ssize_t n = ::pread(fd, data + done, next, static_cast<off_t>(done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail(path, errno);
    if (n == 0) refuse_torn(path);
    done += static_cast<uint64_t>(n);
  }
}

}  // namespace

std::shared_ptr<MappedFile> MappedFile::open(const std::string& path) {
  // O_NONBLOCK: opening a pipe would wait for its other end.
  const Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.fd < 0) fail(path, errno);
  struct stat found {};
  if (::fstat(file.fd, &found) != 0) fail(path, errno);
  if (S_ISDIR(found.st_mode)) fail(path, EISDIR);
  if (!S_ISREG(found.st_mode)) {
    throw CheckpointError(str("Cannot read ", path,
                              ": it is a pipe or a device, not a file. Copy it to a file first."));
  }
  std::shared_ptr<MappedFile> mapped(new MappedFile);
  mapped->path_ = path;
  const auto bytes = static_cast<uint64_t>(found.st_size);
  if (bytes == 0) return mapped;

  // NORESERVE: the file may be larger than the memory; only pages that are written to take any.
  constexpr int kProtection = PROT_READ | PROT_WRITE;
  constexpr int kFlags = MAP_PRIVATE | MAP_NORESERVE;
  void* data = ::mmap(nullptr, bytes, kProtection, kFlags, file.fd, 0);
  if (data == MAP_FAILED && errno != ENODEV) fail(path, errno);  // ENODEV: this disk maps nothing
  if (data != MAP_FAILED) {
    mapped->slot_ = take_slot(data, bytes, mapped->path_.c_str());
    if (mapped->slot_ < 0) ::munmap(data, bytes);
  }
  if (mapped->slot_ < 0) {
    data = ::mmap(nullptr, bytes, kProtection, kFlags | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) fail(path, errno);
  }
  mapped->data_ = static_cast<uint8_t*>(data);
  mapped->size_ = bytes;
  if (mapped->slot_ < 0) read_all(file.fd, mapped->data_, bytes, path);
  return mapped;
}

MappedFile::~MappedFile() {
  if (data_ == nullptr) return;
  // In this order: once unmapped, the addresses may be those of the next file, which takes a slot.
  if (slot_ >= 0) free_slot(slot_);
  ::munmap(data_, size_);
}

void MappedFile::check() const {
  if (slot_ >= 0 && slots[slot_].torn.load()) refuse_torn(path_);
}

int torn_mapped_files() {
  const std::lock_guard<std::mutex> lock(mutex());
  int torn = 0;
  for (int i = 0; i < used_slots.load(); ++i) {
    torn += slots[i].end.load() != 0 && slots[i].torn.load() ? 1 : 0;
  }
  return torn;
}

void check_mapped_files() {
  const std::lock_guard<std::mutex> lock(mutex());
  for (int i = 0; i < used_slots.load(); ++i) {
    if (slots[i].end.load() != 0 && slots[i].torn.load()) refuse_torn(slots[i].path.load());
  }
}

}  // namespace lightning
