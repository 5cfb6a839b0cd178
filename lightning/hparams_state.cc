#include "lightning/hparams_state.h"

#include <ATen/core/Tensor.h>

#include <nlohmann/json.hpp>

#include "lightning/python_text.h"

namespace lightning {
namespace {

constexpr int kMostDepth = 100;
constexpr int64_t kMostElements = 1000;

Json plain(const State& state, int depth);

Json list_of(const State::List& items, int depth) {
  Json list = Json::array();
  for (const State& item : items) list.push_back(plain(item, depth));
  return list;
}

Json map_of(const State::Dict& dict, int depth) {
  Json map = Json::object();
  for (const auto& [key, value] : dict) map[to_string(key)] = plain(value, depth);
  return map;
}

Json number(double value) {
  Json out;
  Codec<double>::write(out, value);
  return out;
}

Json element(const at::Tensor& scalar) {
  if (scalar.scalar_type() == at::kBool) return scalar.item<bool>();
  if (at::isIntegralType(scalar.scalar_type(), false)) return scalar.item<int64_t>();
  return number(scalar.item<double>());
}

Json elements(const at::Tensor& tensor) {
  if (tensor.dim() == 0) return element(tensor);
  Json list = Json::array();
  for (int64_t i = 0; i < tensor.size(0); ++i) list.push_back(elements(tensor.select(0, i)));
  return list;
}

Json of_tensor(const State& state) {
  const auto& tensor = state.as_tensor_state();
  const bool plain_dtype = !c10::isComplexType(tensor.dtype) && !c10::isQIntType(tensor.dtype) &&
                           tensor.dtype != at::ScalarType::UInt64;
  const bool whole = tensor.chunks.size() == 1 && plain_dtype;
  if (!whole || tensor.whole().numel() > kMostElements || tensor.sizes.size() > 8) {
    return state.repr();
  }
  return elements(tensor.whole());
}

// Of an integer beyond 64 signed bits: one that fits unsigned, else its text.
Json of_big_int(const State& state) {
  const std::string& bytes = state.as_big_int().bytes;
  if (bytes.size() > 9 || (bytes.size() == 9 && bytes.back() != '\0')) return state.repr();
  uint64_t value = 0;
  for (size_t i = 0; i < bytes.size() && i < 8; ++i) {
    value |= uint64_t{static_cast<unsigned char>(bytes[i])} << (8 * i);
  }
  return value;
}

// ---- Objects of Python's ------------------------------------------------------------------------

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

const State::List& arguments_of(const State::Object& object) {
  static const State::List none;
  // The pickle has one tuple of arguments, the tree their list.
  return object.how == State::Object::How::kGlobal ? none : object.arguments;
}

// pathlib.PosixPath("/", "data", "train")
std::string path_of(const State::List& parts, const std::string& separator) {
  std::string path;
  for (const State& part : parts) {
    if (!part.is<std::string>()) continue;
    const bool begins = path.empty() || ends_with(path, separator);
    path += (begins ? "" : separator) + part.as_string();
  }
  return path.empty() ? "." : path;
}

// numpy._core.multiarray.scalar(numpy.dtype("f8", False, True), b"...")
Json of_numpy(const State& state, const State::Object& object) {
  const auto& arguments = arguments_of(object);
  if (arguments.size() != 2 || !arguments[0].is_object()) return state.repr();
  const auto& dtype = arguments_of(arguments[0].as_object());
  const std::string kind = !dtype.empty() && dtype[0].is<std::string>() ? dtype[0].as_string() : "";
  if (kind == "b1") return state.as_bool();
  if (kind.rfind('i', 0) == 0 || kind.rfind('u', 0) == 0) return state.as_int();
  if (kind.rfind('f', 0) == 0) return number(state.as_double());
  return state.repr();
}

// builtins.getattr(Color, "RED"), as some versions of Python store a member of an enum: its value
// is not there, its name is.
bool is_member(const std::string& name, const State::List& arguments) {
  return (name == "builtins.getattr" || name == "__builtin__.getattr") && arguments.size() == 2 &&
         arguments[1].is<std::string>();
}

std::string device_of(const State::List& arguments) {
  std::string text = arguments[0].as_string();
  if (arguments.size() > 1 && arguments[1].is<int64_t>()) {
    text += ":" + std::to_string(arguments[1].as_int());
  }
  return text;
}

bool is_plain(const State& state) {
  return state.is_none() || state.is<bool>() || state.is<int64_t>() || state.is<double>() ||
         state.is<std::string>();
}

Json of_object(const State& state, int depth) {
  const auto& object = state.as_object();
  const auto& arguments = arguments_of(object);
  const std::string name = object.full_name();
  if (object.how == State::Object::How::kGlobal) return name;
  if (object.module.rfind("pathlib", 0) == 0) {
    return path_of(arguments, object.name.find("Windows") != std::string::npos ? "\\" : "/");
  }
  if (is_member(name, arguments)) return arguments[1].as_string();
  if (ends_with(name, "multiarray.scalar")) return of_numpy(state, object);
  if (name == "torch.device" && !arguments.empty() && arguments[0].is<std::string>()) {
    return device_of(arguments);
  }
  if (object.entries.size() > 0) return map_of(object.entries, depth);
  if (object.attributes.is_dict()) {
    // OmegaConf keeps a container's items under _content and a leaf's value under _val.
    for (const char* held : {"_content", "_val"}) {
      if (const State* inner = object.attributes.find(held)) return plain(*inner, depth);
    }
    return map_of(object.attributes.as_dict(), depth);
  }
  if (!object.items.empty()) return list_of(object.items, depth);
  if (arguments.size() == 1 && is_plain(arguments[0])) return plain(arguments[0], depth);
  const bool is_list =
      arguments.size() == 1 && (arguments[0].is<State::Tuple>() || arguments[0].is<State::List>());
  if (is_list) return list_of(arguments[0].as_list(), depth);  // torch.Size
  return state.repr();
}

Json plain(const State& state, int depth) {
  if (depth > kMostDepth) return state.repr(100);
  ++depth;
  if (state.is_none()) return nullptr;
  if (state.is<bool>()) return state.as_bool();
  if (state.is<int64_t>()) return state.as_int();
  if (state.is<double>()) return number(state.as_double());
  if (state.is<std::string>()) return state.as_string();
  if (state.is<State::List>() || state.is<State::Tuple>()) return list_of(state.as_list(), depth);
  if (state.is<State::Set>()) return list_of(state.as_set().items, depth);
  if (state.is_dict()) return map_of(state.as_dict(), depth);
  if (state.is<TensorState>()) return of_tensor(state);
  if (state.is<State::BigInt>()) return of_big_int(state);
  if (state.is_object()) return of_object(state, depth);
  return state.repr();
}

}  // namespace

Json hparams_from_state(const State& state) { return plain(state, 0); }

State state_from_hparams(const Json& hparams) {
  double number = 0;
  if (travelling_float(hparams, number)) return number;
  switch (hparams.type()) {
    case Json::value_t::boolean:
      return hparams.get<bool>();
    case Json::value_t::number_integer:
      return hparams.get<int64_t>();
    case Json::value_t::number_unsigned: {
      const auto value = hparams.get<uint64_t>();
      if (value <= uint64_t{INT64_MAX}) return static_cast<int64_t>(value);
      State::BigInt big;
      for (int i = 0; i < 8; ++i) big.bytes += static_cast<char>(value >> (8 * i));
      big.bytes += '\0';
      return big;
    }
    case Json::value_t::number_float:
      return hparams.get<double>();
    case Json::value_t::string:
      return hparams.get<std::string>();
    case Json::value_t::array: {
      State::List items;
      for (const Json& item : hparams) items.push_back(state_from_hparams(item));
      return items;
    }
    case Json::value_t::object: {
      State dict = State::dict();
      for (const auto& item : hparams.items()) dict[item.key()] = state_from_hparams(item.value());
      return dict;
    }
    default:
      return {};
  }
}

}  // namespace lightning
