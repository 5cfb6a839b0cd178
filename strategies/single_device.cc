// One device, no other process: what Strategy does by default.
#include "lightning/registry.h"
#include "lightning/strategy.h"

namespace lightning {
namespace {

class SingleDeviceStrategy : public Strategy {};

const Registration<Strategy> kSingleDevice{
    "single_device", "Trains on one device; no messages, the whole model and its optimizer there.",
    [] { return std::make_unique<SingleDeviceStrategy>(); }};

}  // namespace
}  // namespace lightning
