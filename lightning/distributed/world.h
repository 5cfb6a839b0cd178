// The processes of this program's run, as collectives of c10d.
//
// A process belongs to one world, from its first run with several processes to its end: runs and
// Trainers that follow use the same. The process group is destroyed when the program ends.
// Tensors of the CPU go over Gloo, those of GPUs over NCCL. Collectives are called by all ranks in
// the same order, on the thread that runs.
// Source: Lightning 2.6, `_init_dist_connection`, `DDPStrategy`.
#pragma once

#include <c10/core/Device.h>
#include <c10/util/intrusive_ptr.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "lightning/distributed/cluster_environment.h"
#include "lightning/distributed/collectives.h"
#include "lightning/distributed/side_channel.h"

namespace c10d {
class ProcessGroup;
class Store;
class Work;
}  // namespace c10d

namespace lightning {

struct WorldOptions {
  ProcessPlace place;
  int64_t num_nodes = 1;
  int64_t processes_per_node = 1;
  std::shared_ptr<ClusterEnvironment> environment;
  c10::Device device = c10::Device(c10::kCPU);
  std::string backend;  // "gloo", "nccl"; empty: nccl for a GPU
  std::chrono::milliseconds timeout = std::chrono::minutes(30);  // of one collective
};

class World : public Collectives {
 public:
  // Null where this process is alone, so far.
  static World* current();

  // Starts the processes that nobody started, meets the others, and creates the process group. A
  // second call gives the same world.
  // Errors: those of check(); MisconfigurationError for a backend
  // that this LibTorch or the device does not have; std::runtime_error where the others cannot be
  // reached; what is waited for is said after some seconds (join_notice.h).
  static World& join(const WorldOptions& options);
  // Errors: MisconfigurationError for another place, or another number of processes, than before.
  static void check(const ProcessPlace& place);

  int64_t world_size() const override { return options_.place.world_size; }
  int64_t global_rank() const override { return options_.place.global_rank; }
  bool uses_gloo() const { return backend_ == "gloo"; }

  const c10::intrusive_ptr<c10d::ProcessGroup>& group() const { return group_; }
  // Of these ranks, which are sorted and have this one among them; each of them calls it. A second
  // call gives the same group.
  const c10::intrusive_ptr<c10d::ProcessGroup>& subgroup(const std::vector<int>& ranks);
  // For threads beside the one that runs. Names of one `purpose` are apart from those of others.
  SideChannel side_channel(const std::string& purpose) const;

  at::Tensor reduce(const at::Tensor& tensor, ReduceOp op) override;
  at::Tensor all_gather(const at::Tensor& tensor) override;
  at::Tensor all_gather_rows(const at::Tensor& tensor) override;
  State broadcast(State value, int64_t source_rank = 0) override;
  std::vector<State> all_gather_states(State value) override;
  void barrier(const std::string& name = "") override;
  void wait_for_all(const std::string& name) override;
  bool reduce_any(bool value) override;
  bool reduce_all(bool value) override;

  World(const World&) = delete;
  World& operator=(const World&) = delete;

 private:
  explicit World(const WorldOptions& options);
  ~World() override;

  void meet();
  // What this process waits for before it is in the world.
  std::string joining() const;
  void run_collective(const char* name,
                      const std::function<c10::intrusive_ptr<c10d::Work>()>& start);
  c10::intrusive_ptr<c10d::ProcessGroup> make_group(const std::vector<int>& ranks);
  void wait_for_key(const std::string& key);
  void leave(int status);
  bool shut_down();

  WorldOptions options_;
  std::string backend_;
  c10::intrusive_ptr<c10d::Store> store_;
  std::map<std::vector<int>, c10::intrusive_ptr<c10d::ProcessGroup>> groups_;  // by their ranks
  c10::intrusive_ptr<c10d::ProcessGroup> group_;                               // of all
  std::string address_;                                                        // of this host
  int64_t waits_ = 0;
  std::string main_address_;           // of the meeting point
  std::atomic<int64_t> main_port_{0};  // 0: not known yet
  int process_;
  bool left_ = false;
};

}  // namespace lightning
