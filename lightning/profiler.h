// Times named actions of a run. Source: Lightning 2.6, `Profiler`.
#pragma once

#include <string>

#include "lightning/callback.h"

namespace lightning {

class Profiler {
 public:
  static constexpr const char* kPartKind = "profiler";

  virtual ~Profiler() = default;

  // Errors: std::invalid_argument when an action is started twice or stopped unstarted.
  virtual void start(const std::string& action) = 0;
  virtual void stop(const std::string& action) = 0;
  virtual std::string summary() const = 0;

  virtual void setup(Stage, int64_t /*rank*/, const std::string& /*log_dir*/) {}
  // Writes the summary to the log or to its file, at the end of a run.
  virtual void describe() {}
  virtual void teardown() {}
};

// Times a scope; does nothing at all without a profiler.
class ProfileScope {
 public:
  template <class MakeName>
  ProfileScope(Profiler* profiler, MakeName&& make_name) : profiler_(profiler) {
    if (profiler_ != nullptr) profiler_->start(action_ = make_name());
  }
  ~ProfileScope() {
    if (profiler_ != nullptr) profiler_->stop(action_);
  }
  ProfileScope(const ProfileScope&) = delete;
  ProfileScope& operator=(const ProfileScope&) = delete;

 private:
  Profiler* profiler_;
  std::string action_;
};

}  // namespace lightning
