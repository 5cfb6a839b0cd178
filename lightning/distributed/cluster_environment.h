// Who started the processes of a run, and this one's place among them.
//
// Registered by name ("SLURMEnvironment"). A Trainer takes the first whose variables it finds;
// `plugins` names another. Everything is read from environment variables, nothing is changed.
// Source: Lightning 2.6, `lightning.fabric.plugins.environments`.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace lightning {

// A process's place in the world of a run. A node is what one launcher serves: a machine, mostly.
struct ProcessPlace {
  int64_t world_size = 1;
  int64_t global_rank = 0;
  int64_t local_rank = 0;
  int64_t node_rank = 0;
};

class ClusterEnvironment {
 public:
  static constexpr const char* kPartKind = "cluster_environment";

  virtual ~ClusterEnvironment() = default;

  virtual std::string name() const = 0;  // "SLURMEnvironment"

  // Whether somebody else starts all processes. If not, the program starts those of its own node.
  virtual bool creates_processes_externally() const = 0;
  // How many of them a node has; nullopt where that is not told.
  virtual std::optional<int64_t> processes_per_node() const { return std::nullopt; }

  // This process's place in a world of num_nodes nodes with `devices` processes each.
  // Errors: MisconfigurationError that names the variable which is missing, is no number, or
  // contradicts the flags.
  virtual ProcessPlace place(int64_t devices, int64_t num_nodes) const = 0;

  // Where rank 0 listens. Errors: as above.
  virtual std::string main_address() const = 0;
  // 0: rank 0 takes a free one, and tells those that it starts.
  virtual int64_t main_port() const = 0;
};

}  // namespace lightning
