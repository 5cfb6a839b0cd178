#include "lightning/callback.h"

#include <cxxabi.h>

#include <cstdlib>
#include <memory>

#include "lightning/checkpoint/state.h"

namespace lightning {

const char* to_string(Stage stage) {
  static const char* const names[] = {"fit", "validate", "test", "predict"};
  return names[static_cast<int>(stage)];
}

std::string class_name(const std::type_info& type) {
  const std::unique_ptr<char, void (*)(void*)> demangled(
      abi::__cxa_demangle(type.name(), nullptr, nullptr, nullptr), std::free);
  std::string name = demangled ? demangled.get() : type.name();
  const auto arguments = name.find('<');  // of a template; namespaces in there are not ours to cut
  const auto scope = name.rfind("::", arguments);
  return scope == std::string::npos ? name : name.substr(scope + 2);
}

State Callback::state_dict() const { return {}; }
std::string Callback::state_key() const { return class_name(typeid(*this)); }

}  // namespace lightning
