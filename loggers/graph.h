// The graph of a module's forward, for TensorBoard's graph tab.
#pragma once

#include <string>

#include "lightning/fwd.h"

namespace lightning {

// Traces `module.predict_forward(module.example_input_array)` in eval mode, without gradients, and
// gives the encoded tensorboard.GraphDef. The example takes the way of a batch to the module's
// device. LibTorch's modules leave no mark on what they call, so an operator stands in the scope of
// the parameters that it reads ("encoder/fc1") and others stand at the top.
//
// Empty, with a warning, where the module has no example_input_array.
// Errors: what forward throws, or the tracer for a tensor that neither is registered nor comes from
// the input and requires gradients.
std::string traced_graph(LightningModule& module);

}  // namespace lightning
