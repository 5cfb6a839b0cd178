#include "lightning/hyperparameters.h"

#include <nlohmann/json.hpp>

#include "lightning/registry.h"

namespace lightning {

const Json& Hyperparameters::hparams() const {
  return hparams_ != nullptr ? *hparams_ : empty_config();
}

void Hyperparameters::set_hparams(const Json& hparams, bool logger) {
  hparams_ = std::make_shared<const Json>(hparams);
  log_hparams_ = logger;
}

void Hyperparameters::save_fields(const std::vector<Field>& fields, const void* options,
                                  bool logger) {
  Json hparams;
  write_fields(fields, options, hparams);
  set_hparams(hparams, logger);
}

}  // namespace lightning
