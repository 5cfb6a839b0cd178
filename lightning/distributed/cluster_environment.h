// The scheduler of a cluster that started this process.
#pragma once

#include <string>

namespace lightning {

class ClusterEnvironment {
 public:
  static constexpr const char* kPartKind = "cluster_environment";

  virtual ~ClusterEnvironment() = default;

  virtual std::string name() const = 0;  // "SLURMEnvironment"
};

}  // namespace lightning
