// Times steps of a fit, for the GPU benchmarks; the peer is step_window.py.
//
// The device is waited for at the ends of a window of steps and nowhere else. A result is one line
// of JSON, printed after the word RESULT and appended to the file of --results.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <chrono>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "benchmarks/kernel_trace.h"
#include "lightning/callback.h"
#include "lightning/data/data_loader.h"
#include "lightning/trainer_options.h"

namespace benchmark {

// `--name value` of a command line. --folder is where a run writes, --results a file for results.
class Arguments {
 public:
  Arguments(int argc, char** argv);
  std::string text(const std::string& name, const std::string& otherwise) const;
  int64_t number(const std::string& name, int64_t otherwise) const;

 private:
  std::map<std::string, std::string> given_;
};

// `windows` windows of `steps` steps each, after `warmup` steps.
class StepWindow : public lightning::Callback {
 public:
  explicit StepWindow(const Arguments& arguments);

  // Of steps, with those that are traced and not timed.
  int64_t total() const { return warmup_ + steps_ * windows_ + overlap_steps_; }
  void on_train_batch_end(lightning::Trainer& trainer, lightning::LightningModule& module,
                          const lightning::StepOutput& output, const lightning::Batch& batch,
                          int64_t batch_idx) override;
  // The same for a loop without a Trainer.
  void count(c10::Device device);
  bool is_global_zero() const { return is_global_zero_; }

  double milliseconds() const;           // of a step: the median of the windows
  std::optional<double> joules() const;  // of a step, over all windows
  // With --profile 1: the kernels of the last window, or of the steps of --overlap, largest first,
  // a line each.
  void print_profile() const;
  // With --overlap N: over N steps after the windows, which are traced and not timed.
  const std::optional<Overlap>& overlap() const { return overlap_; }
  double peak_gigabytes() const { return peak_bytes_ / 1e9; }  // of tensors

 private:
  using Clock = std::chrono::steady_clock;

  void trace(c10::Device device);

  int64_t warmup_, steps_, windows_, overlap_steps_, done_ = 0;
  bool prints_ = false, is_global_zero_ = true;
  int64_t traced_ = 0;  // of the last steps
  std::optional<Overlap> overlap_;
  std::map<std::string, std::pair<double, int64_t>> kernels_;  // milliseconds and calls, of a step
  std::vector<Clock::time_point> times_;
  std::vector<std::optional<double>> joules_;  // of the GPU since its driver was loaded
  double peak_bytes_ = 0;
};

// Of the tensors on a GPU now.
double tensor_gigabytes(c10::Device device);

// Batches {x, y} of rows of tokens [samples, time + 1]: y is what follows each token of x.
lightning::DataLoader next_tokens(const at::Tensor& rows, int64_t batch);
// Floating-point operations a token, forward and backward, of a transformer: six for each parameter
// (a shared one counts once), and the products of attention.
double flops_per_token(const torch::nn::Module& module, int64_t layers, int64_t width,
                       int64_t context);
// One GPU with a CSV logger in --folder; --accelerator, --devices and --precision tell otherwise.
lightning::TrainerOptions trainer_options(const Arguments& arguments, const std::string& precision);

using Values = std::vector<std::pair<std::string, double>>;

// Prints and appends a result.
//   tokens            of a step
//   flops_per_token   forward and backward, for the share of a H200's dense bf16 peak
void report(const Arguments& arguments, const std::string& name, const StepWindow& window,
            int64_t tokens, double flops_per_token, const Values& more = {});
// A result of other values.
void report(const Arguments& arguments, const std::string& name, const Values& values);

}  // namespace benchmark
