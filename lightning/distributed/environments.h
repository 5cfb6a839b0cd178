// The cluster environments beside SLURM's, and the choice among all of them.
// Source: Lightning 2.6, `lightning.fabric.plugins.environments`.
#pragma once

#include <memory>

#include "lightning/distributed/cluster_environment.h"

namespace lightning {

// The one whose variables are set: torchrun's, SLURM's, OpenMPI's, else LightningEnvironment.
// KubeflowEnvironment is taken only where it is asked for.
std::shared_ptr<ClusterEnvironment> detect_cluster_environment();

// No cluster: the program starts the other processes of its node itself, unless LOCAL_RANK is set,
// which says that somebody did. On several nodes it is started once on each, with NODE_RANK,
// MASTER_ADDR and MASTER_PORT set. Registered as "LightningEnvironment".
class LightningEnvironment : public ClusterEnvironment {
 public:
  std::string name() const override { return "LightningEnvironment"; }
  bool creates_processes_externally() const override;
  ProcessPlace place(int64_t devices, int64_t num_nodes) const override;
  std::string main_address() const override;
  int64_t main_port() const override;
};

// torchrun: WORLD_SIZE, RANK, LOCAL_RANK, GROUP_RANK. Registered as "TorchElasticEnvironment".
class TorchElasticEnvironment : public ClusterEnvironment {
 public:
  static bool detect();
  std::string name() const override { return "TorchElasticEnvironment"; }
  bool creates_processes_externally() const override { return true; }
  std::optional<int64_t> processes_per_node() const override;
  ProcessPlace place(int64_t devices, int64_t num_nodes) const override;
  std::string main_address() const override;
  int64_t main_port() const override;
};

// OpenMPI's mpirun, read from the variables it sets; nothing of MPI is linked. On several nodes
// MASTER_ADDR has to be given: mpirun -x MASTER_ADDR=<host of rank 0>. Nodes count in the order of
// ranks, as mpirun fills them. Registered as "MPIEnvironment".
class MPIEnvironment : public ClusterEnvironment {
 public:
  static bool detect();
  std::string name() const override { return "MPIEnvironment"; }
  bool creates_processes_externally() const override { return true; }
  std::optional<int64_t> processes_per_node() const override;
  ProcessPlace place(int64_t devices, int64_t num_nodes) const override;
  std::string main_address() const override;
  int64_t main_port() const override;
};

// Kubeflow's PyTorchJob: one process in each pod. Registered as "KubeflowEnvironment".
class KubeflowEnvironment : public ClusterEnvironment {
 public:
  std::string name() const override { return "KubeflowEnvironment"; }
  bool creates_processes_externally() const override { return true; }
  std::optional<int64_t> processes_per_node() const override { return 1; }
  ProcessPlace place(int64_t devices, int64_t num_nodes) const override;
  std::string main_address() const override;
  int64_t main_port() const override;
};

}  // namespace lightning
