// What strategies with one process for each device share: this process's place, the world it
// joins, and its collectives.
// Source: Lightning 2.6, `ParallelStrategy`.
#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "lightning/distributed/world.h"
#include "lightning/duration.h"
#include "lightning/strategy.h"

namespace lightning {

class ParallelStrategy : public Strategy {
 public:
  //   backend   of collectives: "gloo", "nccl"; empty for the one of the device
  //   timeout   after which a collective is an error
  //   option    its name, for errors
  // Errors: MisconfigurationError for a timeout that is no time.
  ParallelStrategy(std::string backend, const Duration& timeout, const std::string& option);

  void connect_processes(std::shared_ptr<ClusterEnvironment> environment,
                         int64_t num_nodes) override;
  bool has_processes() const override { return true; }
  // A world of one process is none: nothing is started, nothing sent.
  void setup_environment() override;

  c10::Device root_device() const override;
  int64_t local_rank() const override { return place_.local_rank; }
  int64_t node_rank() const override { return place_.node_rank; }
  int64_t world_size() const override { return place_.world_size; }
  int64_t global_rank() const override { return place_.global_rank; }
  std::optional<SamplerArguments> sampler_arguments() const override;
  bool supports_inference_mode() const override;

  // Before the run that joins the world they work on this process alone.
  at::Tensor reduce(const at::Tensor& tensor, ReduceOp op) override;
  at::Tensor all_gather(const at::Tensor& tensor) override;
  at::Tensor all_gather_rows(const at::Tensor& tensor) override;
  State broadcast(State value, int64_t source_rank = 0) override;
  std::vector<State> all_gather_states(State value) override;
  void barrier(const std::string& name = "") override;
  void wait_for_all(const std::string& name) override;
  bool reduce_any(bool value) override;
  bool reduce_all(bool value) override;

  void continue_alone() override;

 protected:
  // Null in a world of one process, and before setup_environment().
  World* world() const { return world_; }
  // Errors: MisconfigurationError on all ranks, naming the first parameter or buffer in which a
  // rank's module differs from rank 0's.
  void verify_same_module(const torch::nn::Module& module);
  // Rank 0's parameters and buffers for all.
  void broadcast_module(torch::nn::Module& module);
  void broadcast_tensors(const std::vector<at::Tensor>& tensors);

 private:
  std::string backend_;
  std::chrono::milliseconds timeout_;
  std::shared_ptr<ClusterEnvironment> environment_;
  ProcessPlace place_;
  int64_t num_nodes_ = 1;
  World* world_ = nullptr;
};

// The error for a parameter of an optimizer that is none of the model's.
//   number        of the parameter, through all groups
//   consequence   completes "is not one of this model, so ..."
[[noreturn]] void refuse_foreign_parameter(int64_t number, const at::Tensor& parameter,
                                           const std::string& consequence);

}  // namespace lightning
