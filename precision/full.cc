// "32-true": the model as it was built, in nearly always float32. Nothing is converted.
// Source: Lightning 2.6, `Precision`.
#include "lightning/precision.h"
#include "lightning/registry.h"

namespace lightning {
namespace {

class FullPrecision : public Precision {
 public:
  std::string name() const override { return "32-true"; }
};

const Registration<Precision> k32True{"32-true", "Everything as it was built, in float32.",
                                      [] { return std::make_unique<FullPrecision>(); }};
const Registration<Precision> k32{"32", "The same as 32-true.",
                                  [] { return std::make_unique<FullPrecision>(); }};

}  // namespace
}  // namespace lightning
