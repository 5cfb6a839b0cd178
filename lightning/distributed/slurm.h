// The SLURM scheduler: whether it started this process, and how a job of it is put back in the
// queue.
//
// Registered as "SLURMEnvironment". A Trainer takes it by itself where detect() is true; as a
// plugin it is given other options. What the Trainer does with it: before the time limit (sbatch
// --signal=SIGUSR1@90) or a pre-emption it saves default_root_dir/hpc_ckpt_N.ckpt and requeues the
// job, and a fit() without ckpt_path resumes from the newest of these.
// Source: Lightning 2.6, `SLURMEnvironment`, `_SignalConnector`.
#pragma once

#include <chrono>
#include <optional>
#include <string>

#include "lightning/distributed/cluster_environment.h"
#include "lightning/options.h"

namespace lightning {

struct SLURMEnvironmentOptions : Options<SLURMEnvironmentOptions> {
  OPTION(bool, auto_requeue, true,
         "Whether the signal before the time limit saves the run and requeues the job.");
  OPTION(std::string, requeue_signal, "SIGUSR1",
         "That signal, as given to sbatch --signal. A handler of the program's own goes first.");
};

class SLURMEnvironment : public ClusterEnvironment {
 public:
  // Errors: MisconfigurationError for a requeue_signal that is none, or that ends fit otherwise.
  explicit SLURMEnvironment(const SLURMEnvironmentOptions& options = {});

  std::string name() const override { return "SLURMEnvironment"; }
  bool creates_processes_externally() const override { return true; }
  std::optional<int64_t> processes_per_node() const override;
  // SLURM_NTASKS, SLURM_PROCID, SLURM_LOCALID, SLURM_NODEID. Errors too where sbatch's
  // --ntasks-per-node or --nodes contradict the flags, or tasks were asked for without saying how
  // many a node has.
  ProcessPlace place(int64_t devices, int64_t num_nodes) const override;
  // MASTER_ADDR, else the first host of SLURM_NODELIST.
  std::string main_address() const override;
  // MASTER_PORT, else 15000 and the last four digits of the job's number: the same in every task.
  int64_t main_port() const override;

  bool auto_requeue() const { return auto_requeue_; }
  int requeue_signal() const { return requeue_signal_; }

  // Whether SLURM started this process: SLURM_NTASKS is set, and the job's name is not "bash" or
  // "interactive", for which somebody sits at a terminal.
  static bool detect();
  // "1234", or "1234_7" of an array of jobs; nullopt where SLURM gave none.
  static std::optional<std::string> job_id();

  // "node5" of "node[5-7,9]", "a" of "a,b" and of "a b".
  static std::string first_host(const std::string& nodes);

  // Runs `scontrol requeue` for this job, and waits for it.
  // Errors: std::runtime_error with what it printed, or why it could not be run.
  void requeue(std::chrono::seconds timeout = std::chrono::seconds(60)) const;

 private:
  bool auto_requeue_;
  int requeue_signal_;
};

}  // namespace lightning
