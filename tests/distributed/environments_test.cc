// What the variables of a starter mean, beside the original's reading of the same.
#include "lightning/distributed/environments.h"

#include <catch2/catch.hpp>
#include <cstdlib>
#include <map>
#include <nlohmann/json.hpp>

#include "lightning/distributed/slurm.h"
#include "lightning/errors.h"
#include "lightning/registry.h"
#include "tests/support/python.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;

namespace {

using Variables = std::map<std::string, std::string>;

// None of the starters' variables but these.
class Environment {
 public:
  explicit Environment(const Variables& variables) {
    for (const char* name : {"LOCAL_RANK",
                             "NODE_RANK",
                             "GROUP_RANK",
                             "RANK",
                             "WORLD_SIZE",
                             "LOCAL_WORLD_SIZE",
                             "MASTER_ADDR",
                             "MASTER_PORT",
                             "TORCHELASTIC_RUN_ID",
                             "SLURM_NTASKS",
                             "SLURM_JOB_NAME",
                             "SLURM_JOB_ID",
                             "SLURM_NODELIST",
                             "SLURM_PROCID",
                             "SLURM_LOCALID",
                             "SLURM_NODEID",
                             "SLURM_NTASKS_PER_NODE",
                             "OMPI_COMM_WORLD_SIZE",
                             "OMPI_COMM_WORLD_RANK",
                             "OMPI_COMM_WORLD_LOCAL_RANK",
                             "OMPI_COMM_WORLD_LOCAL_SIZE",
                             "PMIX_NAMESPACE"}) {
      const char* before = std::getenv(name);
      before_[name] = before != nullptr ? before : "";
      unsetenv(name);
    }
    for (const auto& [name, value] : variables) setenv(name.c_str(), value.c_str(), 1);
  }
  ~Environment() {
    for (const auto& [name, value] : before_) {
      value.empty() ? unsetenv(name.c_str()) : setenv(name.c_str(), value.c_str(), 1);
    }
  }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

 private:
  Variables before_;
};

struct Case {
  std::string name;
  Variables variables;
  int64_t devices, nodes;
};

const std::vector<Case>& cases() {
  static const std::vector<Case> all{
      {"LightningEnvironment",
       {{"LOCAL_RANK", "1"}, {"NODE_RANK", "1"}, {"MASTER_ADDR", "a"}, {"MASTER_PORT", "1234"}},
       2,
       2},
      {"LightningEnvironment",
       {{"GROUP_RANK", "1"}, {"MASTER_ADDR", "a"}, {"MASTER_PORT", "99"}},
       3,
       2},
      {"TorchElasticEnvironment",
       {{"TORCHELASTIC_RUN_ID", "x"},
        {"WORLD_SIZE", "6"},
        {"RANK", "4"},
        {"LOCAL_RANK", "1"},
        {"GROUP_RANK", "1"},
        {"MASTER_ADDR", "h"},
        {"MASTER_PORT", "4711"}},
       3,
       2},
      {"TorchElasticEnvironment",
       {{"TORCHELASTIC_RUN_ID", "x"}, {"WORLD_SIZE", "1"}, {"RANK", "0"}, {"LOCAL_RANK", "0"}},
       1,
       1},
      {"SLURMEnvironment",
       {{"SLURM_NTASKS", "4"},
        {"SLURM_NTASKS_PER_NODE", "2"},
        {"SLURM_PROCID", "3"},
        {"SLURM_LOCALID", "1"},
        {"SLURM_NODEID", "1"},
        {"SLURM_NODELIST", "node[5-7,9]"},
        {"SLURM_JOB_ID", "123456"}},
       2,
       2},
      {"SLURMEnvironment",
       {{"SLURM_NTASKS", "1"},
        {"SLURM_PROCID", "0"},
        {"SLURM_LOCALID", "0"},
        {"SLURM_NODEID", "0"}},
       1,
       1},
      {"KubeflowEnvironment",
       {{"WORLD_SIZE", "3"}, {"RANK", "2"}, {"MASTER_ADDR", "pod"}, {"MASTER_PORT", "23456"}},
       1,
       3},
  };
  return all;
}

constexpr const char* kScript = R"(
import json, os, sys
from lightning.fabric.plugins import environments
from lightning.fabric.plugins.environments import SLURMEnvironment

read = []
for case in json.loads(sys.argv[1]):
    os.environ.update(case["variables"])
    environment = getattr(environments, case["name"])()
    if case["name"] == "LightningEnvironment":  # as a strategy does
        environment.set_world_size(case["devices"] * case["nodes"])
        environment.set_global_rank(environment.node_rank() * case["devices"] + environment.local_rank())
    read.append([environment.world_size(), environment.global_rank(), environment.local_rank(),
                 environment.node_rank(), environment.creates_processes_externally,
                 environment.main_address, environment.main_port])
    for name in [*case["variables"], "MASTER_ADDR", "MASTER_PORT"]:
        os.environ.pop(name, None)
hosts = [SLURMEnvironment.resolve_root_node_address(nodes) for nodes in json.loads(sys.argv[2])]
print(json.dumps({"read": read, "hosts": hosts}))
)";

}  // namespace

TEST_CASE("variables mean what they mean to the original", "[distributed]") {
  const std::vector<std::string> lists{
      "alpha",        "alpha,beta",    "alpha beta", "node[5-7]",     "node[05-07,9]",    "node[3]",
      "node[3,5]-ib", "a[1-2],b[3-4]", "a1,b[3-4]",  "host-1-2[8-9]", "10.0.0.1,10.0.0.2"};
  Json given = Json::array();
  for (const auto& one : cases()) {
    given.push_back(Json{{"name", one.name},
                         {"variables", one.variables},
                         {"devices", one.devices},
                         {"nodes", one.nodes}});
  }
  const Environment none({});
  const auto expected = Json::parse(run_python(kScript, {given.dump(), Json(lists).dump()}));
  for (size_t i = 0; i < cases().size(); ++i) {
    const auto& one = cases()[i];
    CAPTURE(one.name, i);
    const Environment variables(one.variables);
    const auto environment = registry<ClusterEnvironment>().make(one.name);
    const auto place = environment->place(one.devices, one.nodes);
    CHECK(Json{place.world_size, place.global_rank, place.local_rank, place.node_rank,
               environment->creates_processes_externally(), environment->main_address(),
               environment->main_port()} == expected.at("read")[i]);
    if (one.name != "KubeflowEnvironment") {
      CHECK(detect_cluster_environment()->name() == one.name);
    }
  }
  for (size_t i = 0; i < lists.size(); ++i) {
    CHECK(SLURMEnvironment::first_host(lists[i]) == expected.at("hosts")[i].get<std::string>());
  }
}

TEST_CASE("a program without a cluster leaves its port to rank 0", "[distributed]") {
  const Environment none({});
  const auto environment = detect_cluster_environment();
  CHECK(environment->name() == "LightningEnvironment");
  CHECK_FALSE(environment->creates_processes_externally());
  CHECK(environment->main_address() == "127.0.0.1");
  CHECK(environment->main_port() == 0);
}

TEST_CASE("OpenMPI's variables place a process, and name a port that all share", "[distributed]") {
  const Variables rank{{"OMPI_COMM_WORLD_SIZE", "4"},
                       {"OMPI_COMM_WORLD_RANK", "3"},
                       {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                       {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"},
                       {"PMIX_NAMESPACE", "prterun-node-5"}};
  auto other = rank;
  other["OMPI_COMM_WORLD_RANK"] = "0";
  int64_t port = 0;
  {
    const Environment variables(rank);
    const auto environment = detect_cluster_environment();
    CHECK(environment->name() == "MPIEnvironment");
    CHECK(environment->processes_per_node() == 2);
    const auto place = environment->place(2, 2);
    CHECK(place.global_rank == 3);
    CHECK(place.local_rank == 1);
    CHECK(place.node_rank == 1);
    CHECK_THROWS_WITH(environment->main_address(), Contains("mpirun -x MASTER_ADDR=<host>"));
    port = environment->main_port();
    CHECK(port >= 10000);
    CHECK(port < 30000);
  }
  const Environment variables(other);
  CHECK(detect_cluster_environment()->main_port() == port);
}
