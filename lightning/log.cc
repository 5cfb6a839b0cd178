#include "lightning/log.h"

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>
#include <utility>

namespace lightning {
namespace {

// Before a Trainer knows: what the starter of this process says.
// Source: Lightning 2.6, `_get_rank`.
int rank_of_environment() {
  for (const char* name : {"RANK", "LOCAL_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"}) {
    if (const char* rank = std::getenv(name)) return std::atoi(rank);
  }
  return 0;
}

struct Sink {
  std::mutex mutex;
  std::function<void(const std::string&)> write;
  std::set<std::string> given;
  int rank = rank_of_environment();
};

Sink& sink() {
  static Sink instance;
  return instance;
}

void put(const std::string& line) {
  auto& to = sink();
  const std::lock_guard<std::mutex> lock(to.mutex);
  if (to.rank != 0) return;
  if (to.write) {
    to.write(line);
  } else {
    std::fprintf(stderr, "%s\n", line.c_str());
  }
}

}  // namespace

void info(const std::string& line) { put(line); }
void warn(const std::string& line) { put("Warning: " + line); }

void warn_once(const std::string& line, const std::string& key) {
  {
    const std::lock_guard<std::mutex> lock(sink().mutex);
    if (!sink().given.insert(key).second) return;
  }
  warn(line);
}

void warn_once(const std::string& line) { warn_once(line, line); }

LogSink set_log_sink(LogSink write) {
  const std::lock_guard<std::mutex> lock(sink().mutex);
  std::swap(write, sink().write);
  return write;
}

void set_log_rank(int rank) { sink().rank = rank; }

}  // namespace lightning
