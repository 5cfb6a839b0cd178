#include "lightning/distributed/state_bytes.h"

#include <ATen/Functions.h>

#include <complex>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>

namespace lightning {
namespace {

// Of one machine type on all ranks: numbers lie as they are in memory.
class Writer {
 public:
  void write(const State& state) {
    if (state.is_none()) {
      out_ += 'n';
    } else if (state.is<bool>()) {
      out_ += state.as_bool() ? 't' : 'f';
    } else if (state.is<int64_t>()) {
      out_ += 'i';
      number(state.as_int());
    } else if (state.is<double>()) {
      out_ += 'd';
      number(state.as_double());
    } else if (state.is<std::string>()) {
      out_ += 's';
      text(state.as_string());
    } else if (state.is<State::Bytes>()) {
      out_ += 'b';
      text(state.as_bytes().value);
    } else if (state.is<TensorState>()) {
      tensor(state.as_tensor());
    } else if (state.is<State::List>() || state.is<State::Tuple>()) {
      out_ += state.is<State::List>() ? 'l' : 'u';
      items(state.as_list());
    } else if (state.is_dict() && state.as_dict().python_class() != nullptr) {
      out_ += 'O';
      object(*state.as_dict().python_class());
      dict(state.as_dict());
    } else if (state.is_dict()) {
      dict(state.as_dict());
    } else if (state.is<State::Set>()) {
      out_ += state.as_set().frozen ? 'z' : 'e';
      items(state.as_set().items);
    } else if (state.is<State::BigInt>()) {
      out_ += 'B';
      text(state.as_big_int().bytes);
    } else if (state.is<std::complex<double>>()) {
      out_ += 'c';
      number(state.as_complex());
    } else {
      out_ += 'o';
      object(state.as_object());
    }
  }
  std::string take() { return std::move(out_); }

 private:
  template <class T>
  void number(T value) {
    char bytes[sizeof value];
    std::memcpy(bytes, &value, sizeof value);
    out_.append(bytes, sizeof value);
  }
  void text(const std::string& value) {
    number(static_cast<int64_t>(value.size()));
    out_ += value;
  }
  void tensor(const at::Tensor& given) {
    const auto host = given.detach().cpu().contiguous();
    out_ += 'T';
    number(static_cast<int64_t>(host.scalar_type()));
    number(host.dim());
    for (const auto size : host.sizes()) number(size);
    out_.append(static_cast<const char*>(host.const_data_ptr()), host.nbytes());
  }
  void items(const State::List& list) {
    number(static_cast<int64_t>(list.size()));
    for (const auto& item : list) write(item);
  }
  void object(const State::Object& object) {
    number(static_cast<int64_t>(object.how));
    text(object.module);
    text(object.name);
    items(object.arguments);
    write(object.attributes);
    items(object.items);
    dict(object.entries);
  }
  void dict(const State::Dict& dict) {
    out_ += 'm';
    number(static_cast<int64_t>(dict.size()));
    for (const auto& [key, value] : dict) {
      if (const auto* name = std::get_if<std::string>(&key)) {
        out_ += 's';
        text(*name);
      } else if (const auto* place = std::get_if<int64_t>(&key)) {
        out_ += 'i';
        number(*place);
      } else {
        const auto& other = std::get<State::OtherKey>(key);
        out_ += 'k';
        text(other.repr);
        write(*other.value);
      }
      write(value);
    }
  }

  std::string out_;
};

class Parser {
 public:
  explicit Parser(const std::string& bytes) : bytes_(bytes) {}

  State read() {
    switch (const char type = *take(1)) {
      case 'n':
        return {};
      case 't':
      case 'f':
        return type == 't';
      case 'i':
        return number<int64_t>();
      case 'd':
        return number<double>();
      case 's':
        return text();
      case 'b':
        return State::Bytes{text()};
      case 'T':
        return tensor();
      case 'l':
        return items();
      case 'u':
        return State::Tuple{items()};
      case 'm':
        return dict();
      case 'O': {
        const auto made = object();
        take(1);
        auto state = dict();
        state.as_dict().set_python_class(std::make_shared<const State::Object>(made));
        return state;
      }
      case 'z':
      case 'e':
        return State::Set{items(), type == 'z'};
      case 'B':
        return State::BigInt{text()};
      case 'c':
        return number<std::complex<double>>();
      case 'o':
        return object();
      default:
        torn();
    }
  }
  void end() const {
    if (place_ != bytes_.size()) torn();
  }

 private:
  [[noreturn]] static void torn() {
    throw std::runtime_error(
        "A message of another rank is torn: the ranks run different programs.");
  }
  const char* take(uint64_t count) {
    if (count > bytes_.size() - place_) torn();
    place_ += count;
    return bytes_.data() + place_ - count;
  }
  template <class T>
  T number() {
    T value;
    std::memcpy(&value, take(sizeof value), sizeof value);
    return value;
  }
  std::string text() {
    const auto size = static_cast<uint64_t>(number<int64_t>());
    return {take(size), size};
  }
  State tensor() {
    const auto dtype = static_cast<at::ScalarType>(number<int64_t>());
    std::vector<int64_t> sizes(static_cast<size_t>(number<int64_t>()));
    for (auto& size : sizes) size = number<int64_t>();
    auto made = at::empty(sizes, dtype);
    const auto* from = take(made.nbytes());
    if (made.nbytes() > 0) std::memcpy(made.data_ptr(), from, made.nbytes());
    return made;
  }
  State::List items() {
    State::List list;
    for (auto left = number<int64_t>(); left > 0; --left) list.push_back(read());
    return list;
  }
  State::Key read_key(char type) {
    if (type == 's') return text();
    if (type == 'i') return number<int64_t>();
    auto repr = text();
    return State::OtherKey{std::move(repr), std::make_shared<const State>(read())};
  }
  State::Object object() {
    State::Object object;
    object.how = static_cast<State::Object::How>(number<int64_t>());
    object.module = text();
    object.name = text();
    object.arguments = items();
    object.attributes = read();
    object.items = items();
    take(1);
    object.entries = dict().as_dict();
    return object;
  }
  State dict() {
    auto state = State::dict();
    for (auto left = number<int64_t>(); left > 0; --left) {
      const auto key = read_key(*take(1));
      state[key] = read();
    }
    return state;
  }

  const std::string& bytes_;
  uint64_t place_ = 0;
};

}  // namespace

std::string to_bytes(const State& state) {
  Writer writer;
  writer.write(state);
  return writer.take();
}

State from_bytes(const std::string& bytes) {
  Parser parser(bytes);
  auto state = parser.read();
  parser.end();
  return state;
}

}  // namespace lightning
