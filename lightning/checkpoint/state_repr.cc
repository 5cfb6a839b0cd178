// State::repr(): the tree as Python shows it.
#include <c10/core/ScalarType.h>

#include <cmath>
#include <complex>
#include <cstdint>
#include <cstdio>
#include <string>
#include <utility>

#include "lightning/checkpoint/state.h"
#include "lightning/errors.h"
#include "lightning/python_text.h"

namespace lightning {
namespace {

// The code point at `i` and its length in bytes; a byte that starts none is length 0.
std::pair<uint32_t, size_t> decode(const std::string& text, size_t i) {
  const auto lead = static_cast<unsigned char>(text[i]);
  if (lead < 0x80) return {lead, 1};
  const size_t length = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
  if (lead < 0xC2 || lead > 0xF4 || i + length > text.size()) return {lead, 0};
  uint32_t code = lead & (0x7F >> length);
  for (size_t k = 1; k < length; ++k) {
    const auto byte = static_cast<unsigned char>(text[i + k]);
    if ((byte & 0xC0) != 0x80) return {lead, 0};
    code = code << 6 | (byte & 0x3F);
  }
  return {code, length};
}

// Python asks Unicode's tables, which also hide what is not assigned.
bool printable(uint32_t code) {
  const bool hidden = code < 0x20 || (code >= 0x7F && code <= 0xA0) || code == 0xAD ||
                      code == 0x1680 || (code >= 0x2000 && code <= 0x200F) ||
                      (code >= 0x2028 && code <= 0x202F) || (code >= 0x205F && code <= 0x206F) ||
                      code == 0x3000 || (code >= 0xD800 && code <= 0xF8FF) || code == 0xFEFF ||
                      (code >= 0xFFF9 && code <= 0xFFFB) || code >= 0xE0000;
  return !hidden;
}

// Stops when more than `most` bytes are there.
class Printer {
 public:
  explicit Printer(size_t most) : most_(most) {}

  void print(const State& state);
  std::string finish() && {
    if (full()) {
      size_t end = most_;
      while (end > 0 && (out_[end] & 0xC0) == 0x80) --end;  // not in the middle of a character
      out_.replace(end, std::string::npos, "...");
    }
    return std::move(out_);
  }

 private:
  bool full() const { return out_.size() > most_; }
  void print_text(const std::string& text);
  void print_bytes(const State::Bytes& bytes);
  void print_big(const State::BigInt& value);
  void print_complex(std::complex<double> value);
  void print_tensor(const TensorState& tensor);
  void print_items(const char* open, const State::List& items, const char* close);
  void print_tuple(const State::List& items);
  void print_entries(const State::Dict& dict);
  void print_pairs(const State::Dict& dict);
  void print_key(const State::Key& key);
  [[gnu::noinline]] void print_dict(const State::Dict& dict);
  [[gnu::noinline]] bool print_numpy(const State& scalar);
  [[gnu::noinline]] void print_object(const State::Object& object);
  void escape(uint32_t code);
  bool plain(char c, char quote);

  std::string out_;
  const size_t most_;
};

char quote_of(const std::string& text) {
  const bool doubled = text.find('\'') != std::string::npos && text.find('"') == std::string::npos;
  return doubled ? '"' : '\'';
}

void Printer::escape(uint32_t code) {
  char text[12];
  std::snprintf(text, sizeof(text),
                code < 0x100     ? "\\x%02x"
                : code < 0x10000 ? "\\u%04x"
                                 : "\\U%08x",
                code);
  out_ += text;
}

// Writes what text and bytes have in common.
bool Printer::plain(char c, char quote) {
  if (c == quote || c == '\\') {
    out_ += {'\\', c};
  } else if (c == '\n' || c == '\r' || c == '\t') {
    out_ += {'\\', c == '\n' ? 'n' : c == '\r' ? 'r' : 't'};
  } else {
    return false;
  }
  return true;
}

void Printer::print_text(const std::string& text) {
  const char quote = quote_of(text);
  out_ += quote;
  for (size_t i = 0; i < text.size() && !full();) {
    const auto [code, length] = decode(text, i);
    if (length == 1 && plain(text[i], quote)) {
      ++i;
      continue;
    }
    length > 0 && printable(code) ? void(out_.append(text, i, length)) : escape(code);
    i += length > 0 ? length : 1;
  }
  out_ += quote;
}

void Printer::print_bytes(const State::Bytes& bytes) {
  if (bytes.is_array) out_ += "bytearray(";
  const char quote = quote_of(bytes.value);
  out_ += {'b', quote};
  for (const char c : bytes.value) {
    if (full()) break;
    if (plain(c, quote)) continue;
    const auto code = static_cast<unsigned char>(c);
    code >= 0x20 && code < 0x7F ? void(out_ += c) : escape(code);
  }
  out_ += quote;
  if (bytes.is_array) out_ += ')';
}

// In tens as far as Python writes them (4,300 digits), else in sixteens.
void Printer::print_big(const State::BigInt& value) {
  std::string bytes = value.bytes;
  const bool negative = !bytes.empty() && (bytes.back() & 0x80) != 0;
  for (size_t i = 0, carry = 1; negative && i < bytes.size(); ++i) {
    const size_t sum = static_cast<unsigned char>(~bytes[i]) + carry;
    bytes[i] = static_cast<char>(sum);
    carry = sum >> 8;
  }
  std::string digits;  // the lowest first
  const bool tens = bytes.size() <= 1785;
  for (size_t left = bytes.size(), i = 0; tens ? left > 0 : i < bytes.size(); ++i) {
    if (!tens) {
      digits += {"0123456789abcdef"[bytes[i] & 15], "0123456789abcdef"[(bytes[i] >> 4) & 15]};
      continue;
    }
    unsigned rest = 0;
    for (size_t k = left; k-- > 0;) {
      rest = rest * 256 + static_cast<unsigned char>(bytes[k]);
      bytes[k] = static_cast<char>(rest / 10);
      rest %= 10;
    }
    digits += static_cast<char>('0' + rest);
    while (left > 0 && bytes[left - 1] == 0) --left;
  }
  while (digits.size() > 1 && digits.back() == '0') digits.pop_back();
  if (digits.empty()) digits = "0";
  out_ += negative ? "-" : "";
  out_ += tens ? "" : "0x";
  out_.append(digits.rbegin(), digits.rend());
}

void Printer::print_complex(std::complex<double> value) {
  const auto part = [](double number) {
    std::string text = python_repr(number);
    if (text.size() > 2 && text.compare(text.size() - 2, 2, ".0") == 0)
      text.resize(text.size() - 2);
    return text;
  };
  const std::string imaginary = part(value.imag()) + "j";
  if (value.real() == 0 && !std::signbit(value.real())) {
    out_ += imaginary;
  } else {
    out_ += "(" + part(value.real()) + (imaginary[0] == '-' ? "" : "+") + imaginary + ")";
  }
}

void Printer::print_tensor(const TensorState& tensor) {
  out_ += tensor.is_parameter ? "Parameter " : "Tensor ";
  out_ += c10::getDtypeNames(tensor.dtype).first + " [";
  for (size_t i = 0; i < tensor.sizes.size(); ++i) {
    out_ += (i == 0 ? "" : ", ") + std::to_string(tensor.sizes[i]);
  }
  out_ += ']';
}

void Printer::print_items(const char* open, const State::List& items, const char* close) {
  out_ += open;
  for (size_t i = 0; i < items.size() && !full(); ++i) {
    if (i > 0) out_ += ", ";
    print(items[i]);
  }
  out_ += close;
}

void Printer::print_tuple(const State::List& items) {
  print_items("(", items, items.size() == 1 ? ",)" : ")");
}

void Printer::print_key(const State::Key& key) {
  const auto* text = std::get_if<std::string>(&key);
  text != nullptr ? print_text(*text) : void(out_ += to_string(key));
}

void Printer::print_entries(const State::Dict& dict) {
  out_ += '{';
  bool first = true;
  for (const auto& [key, value] : dict) {
    if (full()) break;
    if (!first) out_ += ", ";
    first = false;
    print_key(key);
    out_ += ": ";
    print(value);
  }
  out_ += '}';
}

void Printer::print_pairs(const State::Dict& dict) {
  out_ += '[';
  bool first = true;
  for (const auto& [key, value] : dict) {
    if (full()) break;
    out_ += first ? "(" : ", (";
    first = false;
    print_key(key);
    out_ += ", ";
    print(value);
    out_ += ')';
  }
  out_ += ']';
}

void Printer::print_dict(const State::Dict& dict) {
  const auto& type = dict.python_class();
  if (type == nullptr) return print_entries(dict);
  out_ += type->name + "(";
  for (const State& argument : type->arguments) {
    print(argument);
    out_ += ", ";
  }
  if (type->name != "OrderedDict") {
    print_entries(dict);
  } else if (dict.size() > 0) {
    print_pairs(dict);
  }
  out_ += ')';
}

// numpy.float64(0.5) rather than what it is made of.
bool Printer::print_numpy(const State& scalar) {
  const auto& object = scalar.as_object();
  const bool named = object.name == "scalar" && object.module.rfind("numpy.", 0) == 0 &&
                     object.arguments.size() == 2 && object.arguments[0].is_object();
  if (!named) return false;
  const auto& dtype = object.arguments[0].as_object().arguments;
  if (dtype.empty() || !dtype[0].is<std::string>()) return false;
  const auto& type = dtype[0].as_string();
  try {
    const auto name = [&](const char* kind) {
      return str("numpy.", kind, 8 * object.arguments[1].as_bytes().value.size(), "(");
    };
    const char kind = type.empty() ? '?' : type[0];
    std::string text;
    if (kind == 'b') text = str("numpy.bool(", scalar.as_bool() ? "True" : "False");
    if (kind == 'i') text = name("int") + std::to_string(scalar.as_int());
    if (kind == 'u') text = name("uint") + std::to_string(scalar.as_int());
    if (kind == 'f') text = name("float") + python_repr(scalar.as_double());
    if (kind == 'c') text = name("complex") + State(scalar.as_complex()).repr();
    out_ += text.empty() ? "" : text + ")";
    return !text.empty();
  } catch (const CheckpointError&) {
    return false;  // not such a number after all
  }
}

void Printer::print_object(const State::Object& object) {
  const bool sized = object.full_name() == "torch.Size" && object.arguments.size() == 1 &&
                     object.arguments[0].is<State::Tuple>();
  out_ += object.full_name();
  if (sized) return print_items("([", object.arguments[0].as_list(), "])");
  if (object.how == State::Object::How::kGlobal) return;
  print_items("(", object.arguments, ")");
  if (!object.attributes.is_none() && !full()) {
    out_ += " with ";
    print(object.attributes);
  }
  if (!object.items.empty() && !full()) print_items(" [", object.items, "]");
  if (object.entries.size() > 0 && !full()) {
    out_ += ' ';
    print_entries(object.entries);
  }
}

void Printer::print(const State& state) {
  if (full()) return;
  if (state.is_none()) {
    out_ += "None";
  } else if (state.is<bool>()) {
    out_ += state.as_bool() ? "True" : "False";
  } else if (state.is<int64_t>()) {
    out_ += std::to_string(state.as_int());
  } else if (state.is<double>()) {
    out_ += python_repr(state.as_double());
  } else if (state.is<std::complex<double>>()) {
    print_complex(state.as_complex());
  } else if (state.is<State::BigInt>()) {
    print_big(state.as_big_int());
  } else if (state.is<std::string>()) {
    print_text(state.as_string());
  } else if (state.is<State::Bytes>()) {
    print_bytes(state.as_bytes());
  } else if (state.is<TensorState>()) {
    print_tensor(state.as_tensor_state());
  } else if (state.is<State::List>()) {
    print_items("[", state.as_list(), "]");
  } else if (state.is<State::Tuple>()) {
    print_tuple(state.as_list());
  } else if (state.is<State::Set>()) {
    const auto& set = state.as_set();
    const bool braces = !set.items.empty();
    print_items(set.frozen ? braces ? "frozenset({" : "frozenset("
                : braces   ? "{"
                           : "set(",
                set.items,
                set.frozen ? braces ? "})" : ")"
                : braces   ? "}"
                           : ")");
  } else if (state.is_dict()) {
    print_dict(state.as_dict());
  } else if (!print_numpy(state)) {
    print_object(state.as_object());
  }
}

}  // namespace

std::string State::repr(size_t most) const {
  Printer printer(most);
  printer.print(*this);
  return std::move(printer).finish();
}

}  // namespace lightning
