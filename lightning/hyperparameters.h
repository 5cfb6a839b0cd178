// What modules and data modules have in common: options that are kept, logged and saved.
// Source: Lightning 2.6, `HyperparametersMixin`.
#pragma once

#include <memory>
#include <type_traits>
#include <vector>

#include "lightning/options.h"

namespace lightning {

class Hyperparameters {
 public:
  // A map; empty when none were saved.
  const Json& hparams() const;

  //   logger   whether the Trainer sends them to its loggers
  template <class O, std::enable_if_t<is_options<O>::value, int> = 0>
  void save_hyperparameters(const O& options, bool logger = true) {
    save_fields(O::fields(), &options, logger);
  }
  void set_hparams(const Json& hparams, bool logger = true);
  bool logs_hparams() const { return log_hparams_; }

 private:
  void save_fields(const std::vector<Field>& fields, const void* options, bool logger);

  std::shared_ptr<const Json> hparams_;
  bool log_hparams_ = true;
};

}  // namespace lightning
