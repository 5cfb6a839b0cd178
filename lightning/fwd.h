// Names of the house, declared only: enough for interfaces that pass references (0.1 s to compile).
#pragma once

#include <cstdint>

namespace at {
class Tensor;
}
namespace torch {
namespace nn {
class Module;
}
namespace optim {
class Optimizer;
}
}  // namespace torch

namespace lightning {

class Accelerator;
class Batch;
class Callback;
class LRScheduler;
class LightningDataModule;
class LightningModule;
class LRSchedulerConfig;
class LightningOptimizer;
class Loader;
class Logger;
class Metric;
class Precision;
class Profiler;
class State;
class StepExecutor;
class StepOutput;
class Strategy;
class Trainer;

}  // namespace lightning
