#pragma once

namespace lightning {

inline constexpr const char* kVersion = "0.1.0";
// The version of Python Lightning whose checkpoints these are.
inline constexpr const char* kPythonLightningVersion = "2.6.6";

}  // namespace lightning
