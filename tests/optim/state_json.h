// States as JSON, to compare with what Python prints. Tensors are {"shape", "type", "data"}, tuples
// are lists, infinities are strings.
#pragma once

#include <torch/types.h>

#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>
#include <stdexcept>
#include <string>

#include "lightning/checkpoint/state.h"
#include "lightning/options.h"

namespace lightning::testing {

inline std::string read_file(const std::string& path) {
  std::ifstream in(path);
  if (!in.good()) throw std::runtime_error("no file " + path);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

inline Json to_json(const at::Tensor& tensor) {
  const auto flat = tensor.to(at::kDouble).flatten().contiguous();
  const double* data = flat.data_ptr<double>();
  return {{"shape", tensor.sizes().vec()},
          {"type", std::string(c10::toString(tensor.scalar_type()))},
          {"data", std::vector<double>(data, data + flat.numel())}};
}

inline Json to_json(const State& state) {
  if (state.is_none()) return nullptr;
  if (state.is<bool>()) return state.as_bool();
  if (state.is<int64_t>()) return state.as_int();
  if (state.is<std::string>()) return state.as_string();
  if (state.is<TensorState>()) return to_json(state.as_tensor());
  if (state.is<double>()) {
    const double value = state.as_double();
    if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
    return value;
  }
  if (state.is_dict()) {
    Json out = Json::object();
    for (const auto& [key, value] : state.as_dict()) out[to_string(key)] = to_json(value);
    return out;
  }
  Json out = Json::array();
  for (const State& item : state.as_list()) out.push_back(to_json(item));
  return out;
}

inline at::Tensor tensor_from(const Json& in) {
  const auto type = in["type"] == "Float" ? at::kFloat : at::kDouble;
  return torch::tensor(in["data"].get<std::vector<double>>(), at::kDouble)
      .to(type)
      .view(in["shape"].get<std::vector<int64_t>>());
}

inline State state_from(const Json& in) {
  if (in.is_null()) return {};
  if (in.is_boolean()) return in.get<bool>();
  if (in.is_number_integer()) return in.get<int64_t>();
  if (in.is_number()) return in.get<double>();
  if (in == "inf" || in == "-inf") {
    return (in == "inf" ? 1 : -1) * std::numeric_limits<double>::infinity();
  }
  if (in.is_string()) return in.get<std::string>();
  if (in.is_array()) {
    State::List items;
    for (const auto& item : in) items.push_back(state_from(item));
    return items;
  }
  if (in.contains("shape") && in.contains("data")) return tensor_from(in);
  State out = State::dict();
  for (const auto& item : in.items()) {
    const bool number = item.key().find_first_not_of("0123456789") == std::string::npos;
    out[number ? State::Key(int64_t{std::stoll(item.key())}) : State::Key(item.key())] =
        state_from(item.value());
  }
  return out;
}

// Equal keys and values, numbers to within `tolerance` of each other. Where they are not, `where`
// says at which key.
inline bool matches(const Json& a, const Json& b, double tolerance, std::string& where) {
  if (a.is_number() && b.is_number()) {
    const double x = a.get<double>();
    const double y = b.get<double>();
    return std::abs(x - y) <= tolerance * std::max(std::abs(x), std::abs(y)) + tolerance * 1e-3;
  }
  if (a.type() != b.type() || a.size() != b.size()) return false;
  if (a.is_object()) {
    for (const auto& item : a.items()) {
      if (b.contains(item.key()) && matches(item.value(), b[item.key()], tolerance, where))
        continue;
      where = item.key() + (where.empty() ? "" : ".") + where;
      return false;
    }
    return true;
  }
  if (!a.is_array()) return a == b;
  for (size_t i = 0; i < a.size(); ++i) {
    if (matches(a[i], b[i], tolerance, where)) continue;
    where = std::to_string(i) + (where.empty() ? "" : ".") + where;
    return false;
  }
  return true;
}

}  // namespace lightning::testing
