#include "lightning/step/graph_device.h"

namespace lightning {

GraphDeviceFactory& cuda_graph_device() {
  static GraphDeviceFactory factory;
  return factory;
}

}  // namespace lightning
