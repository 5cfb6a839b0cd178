// A logger on a rank that does not log: it tells what rank 0's writes and where, and writes
// nothing.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "lightning/logger.h"

namespace lightning {

class RankZeroLogger : public Logger {
 public:
  // What `logger` says of itself holds until rank 0's is known.
  explicit RankZeroLogger(std::shared_ptr<Logger> logger) : logger_(std::move(logger)) {}

  struct Place {
    std::string version, save_dir, log_dir;
  };
  void set_place(Place place) { place_ = std::make_unique<Place>(std::move(place)); }

  std::string name() const override { return logger_->name(); }
  std::string version() const override { return place_ ? place_->version : logger_->version(); }
  std::string save_dir() const override { return place_ ? place_->save_dir : logger_->save_dir(); }
  std::string log_dir() const override { return place_ ? place_->log_dir : logger_->log_dir(); }
  std::string group_separator() const override { return logger_->group_separator(); }
  void set_default_root_dir(const std::string& dir) override { logger_->set_default_root_dir(dir); }

  void log_metrics(const MetricRow&, int64_t) override {}
  void log_hyperparams(const Json&) override {}
  void finalize(const std::string&) override {}

 private:
  std::shared_ptr<Logger> logger_;
  std::unique_ptr<Place> place_;
};

}  // namespace lightning
