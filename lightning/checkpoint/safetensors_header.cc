#include "lightning/checkpoint/safetensors_header.h"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <tuple>
#include <unordered_set>

#include "lightning/errors.h"

namespace lightning {
namespace {

using Entry = SafetensorsHeader::Entry;
constexpr size_t kMostDims = 64;

constexpr const char* kPacked = "F4";
constexpr const char* kPackedTorch = "float4_e2m1fn_x2";

std::string quoted(const std::string& text) {
  try {
    return nlohmann::json(text).dump();
  } catch (const nlohmann::json::exception&) {
    throw CheckpointError(str("The text \"", text.substr(0, 200),
                              "\" is not UTF-8, which safetensors files ask for. Rename it."));
  }
}

[[noreturn]] void refuse(const std::string& what) {
  throw CheckpointError("the header of the file is broken: " + what);
}

// Takes the header's few forms and nothing else; nesting is two deep, so nothing grows with it.
class Reader : public nlohmann::json_sax<nlohmann::json> {
 public:
  SafetensorsHeader header;

  bool null() override { refuse_here("null"); }
  bool boolean(bool) override { refuse_here("a bool"); }
  bool number_integer(number_integer_t) override { refuse_here("a negative number"); }
  bool number_float(number_float_t, const string_t&) override { refuse_here("a fraction"); }
  bool binary(binary_t&) override { refuse_here("binary data"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (list_ == nullptr) refuse_here("a number");
    if (list_->size() == kMostDims) refuse(str(where(), " has more than ", kMostDims, " numbers"));
    list_->push_back(value);
    return true;
  }

  bool string(string_t& text) override {
    if (place_ == Place::kMetadata) {
      header.metadata[key_] = text;
    } else if (place_ == Place::kEntry && key_ == "dtype") {
      set_dtype(text);
    } else {
      refuse_here("a string");
    }
    return true;
  }

  bool start_object(size_t) override {
    if (place_ == Place::kOutside) {
      place_ = Place::kTop;
    } else if (place_ == Place::kTop && key_ == "__metadata__") {
      place_ = Place::kMetadata;
    } else if (place_ == Place::kTop) {
      place_ = Place::kEntry;
      entry_ = Entry();
      entry_.name = key_;
      has_dtype_ = false;
      shape_.clear();
      offsets_.clear();
      entry_keys_.clear();
    } else {
      refuse_here("a map");
    }
    return true;
  }

  bool key(string_t& text) override {
    key_ = text;
    auto& keys = place_ == Place::kTop        ? names_
                 : place_ == Place::kMetadata ? metadata_keys_
                                              : entry_keys_;
    if (!keys.insert(text).second) refuse(str("the key \"", text, "\" is there twice"));
    const bool known = text == "dtype" || text == "shape" || text == "data_offsets";
    if (place_ == Place::kEntry && !known) {
      refuse(str(where(), " has the unknown key \"", text, "\""));
    }
    return true;
  }

  bool end_object() override {
    if (place_ == Place::kEntry) finish_entry();
    place_ = place_ == Place::kTop ? Place::kOutside : Place::kTop;
    return true;
  }

  bool start_array(size_t) override {
    if (place_ != Place::kEntry || list_ != nullptr || key_ == "dtype") refuse_here("a list");
    list_ = key_ == "shape" ? &shape_ : &offsets_;
    return true;
  }
  bool end_array() override {
    list_ = nullptr;
    return true;
  }

  bool parse_error(size_t position, const std::string&,
                   const nlohmann::json::exception& error) override {
    refuse(str("no JSON at byte ", position, " (", error.what(), ")"));
  }

 private:
  enum class Place { kOutside, kTop, kMetadata, kEntry };

  std::string where() const {
    return place_ == Place::kEntry ? '"' + entry_.name + '"' : "the header";
  }
  [[noreturn]] void refuse_here(const char* what) const {
    refuse(str(where(), " holds ", what, " where it must not (after the key \"", key_, "\")"));
  }

  void set_dtype(const std::string& text) {
    entry_.is_packed = text == kPacked;
    const auto known = entry_.is_packed ? DType::kUInt8 : dtype_of_safetensors(text);
    if (!known) {
      refuse(
          str(where(), " has the dtype ", text, "; known are ", SafetensorsHeader::known_dtypes()));
    }
    entry_.dtype = *known;
    has_dtype_ = true;
  }

  void finish_entry() {
    const bool complete = has_dtype_ && entry_keys_.size() == 3 && offsets_.size() == 2;
    if (!complete) refuse(str(where(), " lacks a dtype, a shape or its two data_offsets"));
    if (entry_.is_packed) halve_last_dim();
    uint64_t bytes = info(entry_.dtype).bytes;
    bool is_empty = false;
    for (const uint64_t size : shape_) {
      is_empty |= size == 0;
      const uint64_t most = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
      if (size > most / bytes) refuse(str(where(), " has more elements than can be counted"));
      bytes *= std::max<uint64_t>(size, 1);
      entry_.sizes.push_back(static_cast<int64_t>(size));
    }
    entry_.begin = offsets_[0];
    entry_.end = offsets_[1];
    if (is_empty) bytes = 0;
    if (entry_.begin > entry_.end || entry_.end - entry_.begin != bytes) {
      refuse(str(where(), " needs ", bytes, " bytes for its shape and dtype, but lies at [",
                 entry_.begin, ", ", entry_.end, ")"));
    }
    header.entries.push_back(std::move(entry_));
  }

  void halve_last_dim() {
    if (shape_.empty() || shape_.back() % 2 != 0) {
      refuse(str(where(), " has an odd number of 4-bit values in its last dim"));
    }
    shape_.back() /= 2;
  }

  Place place_ = Place::kOutside;
  std::string key_;
  std::unordered_set<std::string> names_, metadata_keys_, entry_keys_;
  Entry entry_;
  bool has_dtype_ = false;
  std::vector<uint64_t> shape_, offsets_;
  std::vector<uint64_t>* list_ = nullptr;
};

}  // namespace

std::string SafetensorsHeader::known_dtypes() {
  std::vector<std::string> names;
  for (int i = 0; i <= static_cast<int>(DType::kFloat8E8M0FNU); ++i) {
    const auto& known = info(static_cast<DType>(i));
    if (!known.safetensors.empty()) names.emplace_back(known.torch_name);
  }
  names.emplace_back(kPackedTorch);
  return join(names);
}

std::string SafetensorsHeader::to_json() const {
  std::string json = "{";
  if (!metadata.empty()) {
    json += "\"__metadata__\":{";
    for (const auto& [key, value] : metadata) {
      if (json.back() != '{') json += ',';
      json += quoted(key) + ':' + quoted(value);
    }
    json += '}';
  }
  for (const auto& entry : entries) {
    auto shape = entry.sizes;
    if (entry.is_packed && !shape.empty()) shape.back() *= 2;
    const auto dtype = entry.is_packed ? kPacked : info(entry.dtype).safetensors;
    std::vector<std::string> sizes;
    for (const auto size : shape) sizes.push_back(std::to_string(size));
    if (json.size() > 1) json += ',';
    json += str(quoted(entry.name), ":{\"dtype\":\"", dtype, "\",\"shape\":[", join(sizes, ","),
                "],\"data_offsets\":[", entry.begin, ",", entry.end, "]}");
  }
  json += '}';
  json.append((8 - json.size() % 8) % 8, ' ');
  if (json.size() > kMostBytes) {
    throw CheckpointError(
        str("What stands beside the tensors takes ", json.size(), " bytes, more than the ",
            kMostBytes, " that a safetensors header may have. Keep large values in tensors."));
  }
  return json;
}

SafetensorsHeader SafetensorsHeader::parse(std::string_view json, uint64_t data_bytes) {
  if (json.empty() || json[0] != '{') refuse("it does not begin with {");
  Reader reader;
  nlohmann::json::sax_parse(json, &reader);
  auto& entries = reader.header.entries;
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::tie(a.begin, a.end) < std::tie(b.begin, b.end);
  });
  uint64_t end = 0;
  for (const auto& entry : entries) {
    if (entry.begin != end) {
      refuse(str("\"", entry.name, "\" begins at ", entry.begin,
                 ", but the data before it ends at ", end));
    }
    end = entry.end;
  }
  if (end != data_bytes) {
    refuse(str("its tensors take ", end, " bytes, the file has ", data_bytes, " for them"));
  }
  return std::move(reader.header);
}

}  // namespace lightning
