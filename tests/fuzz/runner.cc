#include "tests/fuzz/runner.h"

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace lightning::fuzz {
namespace {

constexpr size_t kMostFailures = 10;
// A child says with this that the text of the failure is there.
constexpr int kFailed = 77;

// What the child tells the parent; it may end at any moment.
struct Shared {
  uint64_t next;  // the input that runs
  uint64_t read;
  uint64_t refused;
  double slowest_seconds;
  uint64_t slowest;
  double most_bytes_per_byte;
  uint64_t hungriest;
  char failure[2000];
};

struct Work {
  uint64_t end;
  const std::function<Input(uint64_t)>& make;
  const std::function<Outcome(const Input&)>& trial;
  const std::function<void()>& warm_up;
  const RunOptions& options;
  Shared& shared;
};

double processor_seconds() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// SIGPROF ends a process that takes so long; until then nobody looks.
void end_after(double seconds) {
  itimerval timer{};
  timer.it_value.tv_sec = static_cast<time_t>(seconds);
  setitimer(ITIMER_PROF, &timer, nullptr);
}

[[noreturn]] void fail(Shared& shared, const std::string& what) {
  std::snprintf(shared.failure, sizeof(shared.failure), "%s", what.c_str());
  _exit(kFailed);
}

void try_one(const Work& work) {
  Shared& shared = work.shared;
  const Input input = work.make(shared.next);
  const double begin = processor_seconds();
  const Outcome outcome = work.trial(input);
  const double seconds = processor_seconds() - begin;
  ++(outcome.read ? shared.read : shared.refused);
  if (seconds > shared.slowest_seconds) {
    shared.slowest_seconds = seconds;
    shared.slowest = shared.next;
  }
  const double ratio =
      static_cast<double>(outcome.peak_bytes) / static_cast<double>(input.bytes.size() + 1);
  if (input.bytes.size() >= 1000 && ratio > shared.most_bytes_per_byte) {
    shared.most_bytes_per_byte = ratio;
    shared.hungriest = shared.next;
  }
  if (seconds > work.options.most_seconds) {
    fail(shared, "it took " + std::to_string(seconds) + " s");
  }
  if (outcome.left_bytes != 0) {
    fail(shared, std::to_string(outcome.left_bytes) + " bytes were not freed");
  }
}

void* run_child(void* argument) {
  const Work& work = *static_cast<const Work*>(argument);
  try {
    work.warm_up();
    for (; work.shared.next < work.end; ++work.shared.next) {
      end_after(4 * work.options.most_seconds);
      try_one(work);
    }
  } catch (const std::exception& error) {
    fail(work.shared, error.what());
  } catch (...) {
    fail(work.shared, "an exception that is none of std");
  }
  _exit(0);
}

[[noreturn]] void child(const Work& work) {
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_t thread;
  if (pthread_attr_setstacksize(&attributes, work.options.stack_bytes) != 0 ||
      pthread_create(&thread, &attributes, run_child, const_cast<Work*>(&work)) != 0) {
    fail(work.shared, "no thread with a stack of its own");
  }
  pthread_join(thread, nullptr);
  _exit(1);  // not reached: the thread ends the process
}

std::string end_in_words(int status, const Shared& shared) {
  if (WIFSIGNALED(status)) {
    const int signal = WTERMSIG(status);
    return signal == SIGPROF ? "it did not end" : std::string("ended by ") + strsignal(signal);
  }
  if (WEXITSTATUS(status) == kFailed) return shared.failure;
  return "the process ended with status " + std::to_string(WEXITSTATUS(status)) +
         "; the sanitizer's report is above";
}

// Where Bazel keeps what a test wants to show, else beside other temporary files.
std::string save(const Input& input) {
  const char* folder = std::getenv("TEST_UNDECLARED_OUTPUTS_DIR");
  auto name = input.name;
  std::replace_if(
      name.begin(), name.end(), [](char c) { return c == ' ' || c == '/'; }, '_');
  const auto path = std::string(folder == nullptr ? "/tmp" : folder) + "/" + name;
  std::ofstream(path, std::ios::binary) << input.bytes;
  return path;
}

}  // namespace

std::string Report::words() const {
  std::ostringstream out;
  out.precision(3);
  out << read + refused << " inputs in " << seconds << " s: " << read << " read, " << refused
      << " refused; slowest " << 1000 * slowest_seconds << " ms (" << slowest << "), most memory "
      << most_bytes_per_byte << " times the file (" << hungriest << ")";
  for (const auto& failure : failures) out << "\n" << failure;
  return out.str();
}

Report run_inputs(uint64_t first, uint64_t count, const std::function<Input(uint64_t)>& make,
                  const std::function<Outcome(const Input&)>& trial,
                  const std::function<void()>& warm_up, const RunOptions& options) {
  void* place =
      mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (place == MAP_FAILED) throw std::runtime_error("no memory to share");
  auto& shared = *new (place) Shared{};
  shared.next = first;
  Report report;
  const Work work{first + count, make, trial, warm_up, options, shared};
  const auto begin = std::chrono::steady_clock::now();
  while (shared.next < work.end && report.failures.size() < kMostFailures) {
    const pid_t pid = fork();
    if (pid < 0) throw std::runtime_error("no process");
    if (pid == 0) child(work);
    int status = 0;
    waitpid(pid, &status, 0);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) break;
    const Input input = make(shared.next);
    report.failures.push_back(input.name + ": " + end_in_words(status, shared) +
                              "\n  its bytes: " + save(input));
    ++shared.next;
  }
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  report.read = shared.read;
  report.refused = shared.refused;
  report.slowest_seconds = shared.slowest_seconds;
  report.most_bytes_per_byte = shared.most_bytes_per_byte;
  if (count != 0) {
    report.slowest = make(std::max(first, shared.slowest)).name;
    report.hungriest = make(std::max(first, shared.hungriest)).name;
  }
  munmap(place, sizeof(Shared));
  return report;
}

uint64_t number_from(const char* variable, uint64_t otherwise) {
  const char* text = std::getenv(variable);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

}  // namespace lightning::fuzz
