#include "lightning/distributed/environments.h"

#include <string_view>

#include "lightning/distributed/environment_variable.h"
#include "lightning/distributed/slurm.h"
#include "lightning/errors.h"
#include "lightning/log.h"
#include "lightning/registry.h"

namespace lightning {
namespace {

const Registration<ClusterEnvironment> kLightning{
    "LightningEnvironment", "No cluster: the program starts the processes of its node itself.",
    [] { return std::make_unique<LightningEnvironment>(); }};
const Registration<ClusterEnvironment> kTorchElastic{
    "TorchElasticEnvironment", "Processes that torchrun started.",
    [] { return std::make_unique<TorchElasticEnvironment>(); }};
const Registration<ClusterEnvironment> kMPI{"MPIEnvironment",
                                            "Processes that OpenMPI's mpirun started.",
                                            [] { return std::make_unique<MPIEnvironment>(); }};
const Registration<ClusterEnvironment> kKubeflow{
    "KubeflowEnvironment", "Processes that Kubeflow's PyTorchJob started, one in each pod.",
    [] { return std::make_unique<KubeflowEnvironment>(); }};

// What a starter without a word about it would mean.
constexpr int64_t kUsualPort = 12910;

std::string address_or_here(const char* who) {
  if (const auto address = environment_variable("MASTER_ADDR")) return *address;
  warn_once(str(who, ": MASTER_ADDR is not set, 127.0.0.1 is taken."));
  return "127.0.0.1";
}

int64_t port_or_usual(const char* who) {
  if (const auto port = given_main_port(who)) return *port;
  warn_once(str(who, ": MASTER_PORT is not set, ", kUsualPort, " is taken."));
  return kUsualPort;
}

void check_world(const char* who, const char* variable, const ProcessPlace& place, int64_t devices,
                 int64_t num_nodes) {
  if (devices * num_nodes != place.world_size) {
    throw MisconfigurationError(str("Trainer got devices=", devices, " and num_nodes=", num_nodes,
                                    ", which makes ", devices * num_nodes, " processes, but ", who,
                                    " says that there are ", place.world_size, " (", variable,
                                    "). Change one of them."));
  }
  if (place.local_rank >= devices) {
    throw MisconfigurationError(str(who, " gives this process the local rank ", place.local_rank,
                                    ", but Trainer got devices=", devices,
                                    ". Start that many processes on each node."));
  }
  if (place.global_rank >= place.world_size) {
    throw MisconfigurationError(str(who, " gives this process the rank ", place.global_rank,
                                    " in a world of ", place.world_size,
                                    ". Ranks count from 0: the variables of its starter are "
                                    "mixed up."));
  }
}

}  // namespace

std::shared_ptr<ClusterEnvironment> detect_cluster_environment() {
  if (TorchElasticEnvironment::detect()) return std::make_shared<TorchElasticEnvironment>();
  if (SLURMEnvironment::detect()) return std::make_shared<SLURMEnvironment>();
  if (MPIEnvironment::detect()) return std::make_shared<MPIEnvironment>();
  return std::make_shared<LightningEnvironment>();
}

// ---- No cluster ---------------------------------------------------------------------------------

bool LightningEnvironment::creates_processes_externally() const {
  return environment_variable("LOCAL_RANK").has_value();
}

ProcessPlace LightningEnvironment::place(int64_t devices, int64_t num_nodes) const {
  constexpr const char* who = "LightningEnvironment";
  ProcessPlace place;
  place.local_rank = optional_number("LOCAL_RANK", who).value_or(0);
  place.node_rank =
      optional_number("NODE_RANK", who).value_or(optional_number("GROUP_RANK", who).value_or(0));
  place.world_size = devices * num_nodes;
  place.global_rank = place.node_rank * devices + place.local_rank;
  for (const char* needed : {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"}) {
    const bool other =
        std::string_view(needed) == "NODE_RANK" && environment_variable("GROUP_RANK");
    if (num_nodes == 1 || other || environment_variable(needed)) continue;
    throw MisconfigurationError(
        str("Trainer got num_nodes=", num_nodes, ", but ", needed,
            " is not set in the environment. Start the program once on each node with NODE_RANK=0 "
            "to ",
            num_nodes - 1,
            " and with MASTER_ADDR and MASTER_PORT of the node of rank 0, or start it with "
            "torchrun, srun or mpirun."));
  }
  if (place.node_rank >= num_nodes) {
    throw MisconfigurationError(str("NODE_RANK is ", place.node_rank,
                                    ", but Trainer got num_nodes=", num_nodes,
                                    ". Nodes count from 0: change one of them."));
  }
  if (creates_processes_externally()) {
    auto told = place;
    told.world_size = optional_number("WORLD_SIZE", who).value_or(place.world_size);
    check_world(who, "WORLD_SIZE", told, devices, num_nodes);
  }
  return place;
}

std::string LightningEnvironment::main_address() const {
  return environment_variable("MASTER_ADDR").value_or("127.0.0.1");
}

int64_t LightningEnvironment::main_port() const {
  return given_main_port("LightningEnvironment").value_or(0);
}

// ---- torchrun -----------------------------------------------------------------------------------

bool TorchElasticEnvironment::detect() {
  return environment_variable("TORCHELASTIC_RUN_ID").has_value();
}

std::optional<int64_t> TorchElasticEnvironment::processes_per_node() const {
  return optional_number("LOCAL_WORLD_SIZE", "TorchElasticEnvironment");
}

ProcessPlace TorchElasticEnvironment::place(int64_t devices, int64_t num_nodes) const {
  constexpr const char* who = "TorchElasticEnvironment";
  ProcessPlace place;
  place.world_size = environment_number("WORLD_SIZE", who);
  place.global_rank = environment_number("RANK", who);
  place.local_rank = environment_number("LOCAL_RANK", who);
  place.node_rank = optional_number("GROUP_RANK", who).value_or(0);
  check_world(who, "WORLD_SIZE", place, devices, num_nodes);
  return place;
}

std::string TorchElasticEnvironment::main_address() const {
  return address_or_here("TorchElasticEnvironment");
}

int64_t TorchElasticEnvironment::main_port() const {
  return port_or_usual("TorchElasticEnvironment");
}

// ---- OpenMPI ------------------------------------------------------------------------------------

bool MPIEnvironment::detect() {
  const auto size = optional_number("OMPI_COMM_WORLD_SIZE", "MPIEnvironment");
  return size && *size > 1;
}

std::optional<int64_t> MPIEnvironment::processes_per_node() const {
  return optional_number("OMPI_COMM_WORLD_LOCAL_SIZE", "MPIEnvironment");
}

ProcessPlace MPIEnvironment::place(int64_t devices, int64_t num_nodes) const {
  constexpr const char* who = "MPIEnvironment";
  ProcessPlace place;
  place.world_size = environment_number("OMPI_COMM_WORLD_SIZE", who);
  place.global_rank = environment_number("OMPI_COMM_WORLD_RANK", who);
  place.local_rank = environment_number("OMPI_COMM_WORLD_LOCAL_RANK", who);
  check_world(who, "OMPI_COMM_WORLD_SIZE", place, devices, num_nodes);
  place.node_rank = place.global_rank / devices;
  return place;
}

std::string MPIEnvironment::main_address() const {
  if (const auto address = environment_variable("MASTER_ADDR")) return *address;
  constexpr const char* who = "MPIEnvironment";
  const auto all = environment_number("OMPI_COMM_WORLD_SIZE", who);
  if (processes_per_node().value_or(all) == all) return "127.0.0.1";
  throw MisconfigurationError(
      "MPIEnvironment: the processes are on several nodes, and MASTER_ADDR is not set. Give the "
      "host of rank 0 to all of them: mpirun -x MASTER_ADDR=<host>.");
}

// One number for all processes of a job, by the name that mpirun gives it.
int64_t MPIEnvironment::main_port() const {
  if (const auto port = given_main_port("MPIEnvironment")) return *port;
  for (const char* name : {"PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"}) {
    const auto job = environment_variable(name);
    if (!job) continue;
    uint32_t hash = 2166136261u;  // FNV-1a
    for (const char c : *job) hash = (hash ^ static_cast<unsigned char>(c)) * 16777619u;
    return 10000 + static_cast<int64_t>(hash % 20000);
  }
  return kUsualPort;
}

// ---- Kubeflow -----------------------------------------------------------------------------------

ProcessPlace KubeflowEnvironment::place(int64_t devices, int64_t num_nodes) const {
  constexpr const char* who = "KubeflowEnvironment";
  ProcessPlace place;
  place.world_size = environment_number("WORLD_SIZE", who);
  place.global_rank = environment_number("RANK", who);
  place.node_rank = place.global_rank;
  check_world(who, "WORLD_SIZE", place, devices, num_nodes);
  return place;
}

std::string KubeflowEnvironment::main_address() const {
  if (const auto address = environment_variable("MASTER_ADDR")) return *address;
  throw MisconfigurationError(
      "KubeflowEnvironment reads MASTER_ADDR from the environment, which is not set. It is set in "
      "the pods of a PyTorchJob.");
}

int64_t KubeflowEnvironment::main_port() const {
  return environment_number("MASTER_PORT", "KubeflowEnvironment");
}

}  // namespace lightning
