#include "lightning/datamodule.h"

#include <stdexcept>

namespace lightning {

Trainer& LightningDataModule::trainer() const {
  if (trainer_ == nullptr) {
    throw std::runtime_error(
        "trainer() was asked of a data module that no Trainer runs. Pass it to fit first.");
  }
  return *trainer_;
}

}  // namespace lightning
