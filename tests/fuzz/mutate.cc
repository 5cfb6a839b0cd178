#include "tests/fuzz/mutate.h"

#include <algorithm>
#include <cstring>

#include "lightning/checkpoint/crc32.h"
#include "lightning/checkpoint/pickle_opcode.h"
#include "lightning/checkpoint/zip_format.h"

namespace lightning::fuzz {
namespace {

using namespace zip_format;

// Mutations add to a file; seeds that are put together grow no further than this.
constexpr size_t kMostBytes = size_t{1} << 16;

constexpr uint64_t kBoundaries[] = {
    0,          1,          2,          3,           4,          5,
    7,          8,          63,         64,          65,         127,
    128,        255,        256,        0x7fff,      0x8000,     0xfffe,
    0xffff,     0x10000,    0x7fffffff, 0x80000000,  0xfffffffe, 0xffffffff,
    1ull << 32, 1ull << 33, 1ull << 40, 1ull << 62,  1ull << 61, (1ull << 63) - 1,
    1ull << 63, ~0ull - 64, ~0ull - 7,  ~0ull - 0xf, ~0ull - 1,  ~0ull,
};

uint64_t odd_number(Random& random, uint64_t now, size_t size) {
  switch (random.below(5)) {
    case 0:
      return now + 1 - random.below(3);
    case 1:
      return size + 8 - random.below(17);
    case 2:
      return now << random.below(8);
    case 3:
      return random.below(size + 1);
    default:
      return random.pick(kBoundaries);
  }
}

uint64_t get(const std::string& bytes, size_t at, size_t width) {
  uint64_t value = 0;
  for (size_t i = 0; i < width; ++i) {
    value |= uint64_t{static_cast<uint8_t>(bytes[at + i])} << (8 * i);
  }
  return value;
}

void put(std::string& bytes, size_t at, uint64_t value, size_t width) {
  for (size_t i = 0; i < width; ++i) bytes[at + i] = static_cast<char>(value >> (8 * i));
}

std::string little_endian(uint64_t value, size_t width) {
  std::string bytes(width, '\0');
  put(bytes, 0, value, width);
  return bytes;
}

void change_number(std::string& bytes, size_t at, size_t width, Random& random) {
  if (at + width > bytes.size()) return;
  put(bytes, at, odd_number(random, get(bytes, at, width), bytes.size()), width);
}

// -- pickles -----------------------------------------------------------------------------------

// What follows an opcode: so many bytes, or a text whose length stands in so many bytes before it,
// or lines.
struct Form {
  size_t bytes = 0;
  size_t length = 0;
  size_t lines = 0;
};

Form form_of(uint8_t opcode) {
  using namespace pickle_opcode;
  switch (opcode) {
    case kProto:
    case kBinInt1:
    case kBinGet:
    case kBinPut:
      return {1, 0, 0};
    case kBinInt2:
      return {2, 0, 0};
    case kBinInt:
    case kLongBinGet:
    case kLongBinPut:
      return {4, 0, 0};
    case kBinFloat:
    case kFrame:
      return {8, 0, 0};
    case kShortBinString:
    case kShortBinUnicode:
    case kShortBinBytes:
    case kLong1:
      return {0, 1, 0};
    case kBinString:
    case kBinUnicode:
    case kBinBytes:
    case kLong4:
      return {0, 4, 0};
    case kBinUnicode8:
    case kBinBytes8:
    case kByteArray8:
      return {0, 8, 0};
    case kGlobalName:
      return {0, 0, 2};
    default:
      return {};
  }
}

struct Step {
  size_t begin = 0;
  size_t end = 0;
  Form form;
};

// The opcodes with their arguments, as far as they go.
std::vector<Step> steps_of(const std::string& bytes) {
  std::vector<Step> steps;
  for (size_t at = 0; at < bytes.size();) {
    Step step{at, at + 1, form_of(static_cast<uint8_t>(bytes[at]))};
    step.end += step.form.bytes + step.form.length;
    if (step.form.length != 0 && step.end <= bytes.size()) {
      step.end += std::min<uint64_t>(get(bytes, at + 1, step.form.length), bytes.size());
    }
    for (size_t line = 0; line < step.form.lines; ++line) {
      const auto newline = bytes.find('\n', step.end);
      step.end = newline == std::string::npos ? bytes.size() : newline + 1;
    }
    step.end = std::min(step.end, bytes.size());
    steps.push_back(step);
    at = step.end;
  }
  return steps;
}

constexpr const char* kGlobals[] = {
    "collections\nOrderedDict",
    "collections\ndefaultdict",
    "collections\nCounter",
    "torch._utils\n_rebuild_tensor",
    "torch._utils\n_rebuild_tensor_v2",
    "torch._utils\n_rebuild_tensor_v3",
    "torch._utils\n_rebuild_parameter",
    "torch._utils\n_rebuild_parameter_with_state",
    "torch._tensor\n_rebuild_from_type_v2",
    "torch._utils\n_rebuild_meta_tensor_no_storage",
    "torch._utils\n_rebuild_sparse_tensor",
    "torch\nFloatStorage",
    "torch\nComplexDoubleStorage",
    "torch\nBoolStorage",
    "torch.storage\nUntypedStorage",
    "torch\nSize",
    "torch\ndevice",
    "torch\nfloat32",
    "torch\nfloat8_e4m3fn",
    "__builtin__\nset",
    "__builtin__\nfrozenset",
    "__builtin__\ncomplex",
    "__builtin__\nbytearray",
    "__builtin__\nbytes",
    "__builtin__\ngetattr",
    "_codecs\nencode",
    "numpy.core.multiarray\nscalar",
    "numpy._core.multiarray\n_reconstruct",
    "numpy\ndtype",
    "numpy\nndarray",
    "posix\nsystem",
    "torch.distributed.checkpoint.metadata\nMetadata",
    "torch.distributed.checkpoint.metadata\nTensorStorageMetadata",
    "torch.distributed.checkpoint.metadata\nBytesStorageMetadata",
    "torch.distributed.checkpoint.metadata\nChunkStorageMetadata",
    "torch.distributed.checkpoint.metadata\nMetadataIndex",
    "torch.distributed.checkpoint.filesystem\n_StorageInfo",
};
constexpr const char* kWords[] = {
    "storage",
    "0",
    "1",
    "00",
    "-1",
    "cpu",
    "cuda:0",
    "weight",
    "conj",
    "neg",
    "",
    "_metadata",
    "_is_param",
    "latin1",
    "\xc3",
    "\xed\xa0\x80",
    "../x",
    "a/b",
    "fqn",
    "offset",
    "index",
    "sizes",
    "size",
    "offsets",
    "length",
    "chunks",
    "relative_path",
    "storage_data",
    "planner_data",
    "transform_descriptors",
};

std::string random_step(Random& random) {
  using namespace pickle_opcode;
  static constexpr uint8_t kPlain[] = {
      kMark,           kStop,       kPop,       kPopMark,  kDup,         kNoneValue,
      kBinPersId,      kReduce,     kAppend,    kBuild,    kDictOfMark,  kEmptyDict,
      kAppends,        kListOfMark, kEmptyList, kSetItem,  kSetItems,    kTupleOfMark,
      kEmptyTuple,     kNewObj,     kTuple1,    kTuple2,   kTuple3,      kNewTrue,
      kNewFalse,       kEmptySet,   kAddItems,  kNewObjEx, kStackGlobal, kMemoize,
      kFrozenSetOfMark};
  static constexpr uint8_t kSized[] = {kShortBinString, kShortBinUnicode, kShortBinBytes, kLong1,
                                       kBinString,      kBinUnicode,      kBinBytes,      kLong4,
                                       kBinUnicode8,    kBinBytes8,       kByteArray8};
  static constexpr uint8_t kNumbers[] = {kProto,  kBinInt1,    kBinGet,     kBinPut,   kBinInt2,
                                         kBinInt, kLongBinGet, kLongBinPut, kBinFloat, kFrame};
  const auto begin = [](uint8_t opcode) { return std::string(1, static_cast<char>(opcode)); };
  switch (random.below(8)) {
    case 0:
    case 1:
    case 2:
    case 3:
      return begin(random.pick(kPlain));
    case 4: {
      const auto opcode = random.pick(kSized);
      const std::string text = random.pick(kWords);
      return begin(opcode) + little_endian(text.size(), form_of(opcode).length) + text;
    }
    case 5: {
      const auto opcode = random.pick(kNumbers);
      const bool small = random.one_in(2);
      const uint64_t value = small ? random.below(40) : random.pick(kBoundaries);
      return begin(opcode) + little_endian(value, form_of(opcode).bytes);
    }
    case 6:
      return std::string("c") + random.pick(kGlobals) + "\n";
    default:
      return begin(static_cast<uint8_t>(random.next()));
  }
}

// -- zip files ---------------------------------------------------------------------------------

// Those of a whole zip: of the seeds.
std::vector<std::pair<std::string, std::string>> records_of(const std::string& zip) {
  std::vector<std::pair<std::string, std::string>> records;
  const auto* data = reinterpret_cast<const uint8_t*>(zip.data());
  size_t at = zip.find("PK\1\2");
  while (at != std::string::npos && at + kEntryBytes <= zip.size() && get32(data + at) == kEntry) {
    const size_t name_bytes = get16(data + at + 28);
    const size_t header = get32(data + at + 42);
    const size_t bytes = get32(data + at + 24);
    const auto name = zip.substr(at + kEntryBytes, name_bytes);
    at += kEntryBytes + name_bytes + get16(data + at + 30) + get16(data + at + 32);
    if (header + kLocalHeaderBytes > zip.size()) break;
    const size_t begin =
        header + kLocalHeaderBytes + get16(data + header + 26) + get16(data + header + 28);
    if (begin > zip.size()) break;
    const auto slash = name.find('/');
    if (slash == std::string::npos || slash + 1 == name.size()) continue;
    records.emplace_back(name.substr(slash + 1), zip.substr(begin, bytes));
  }
  return records;
}

// Forms that zips may have, and lies of their directories.
struct ZipForm {
  bool aligned = true;
  bool zip64_end = true;
  bool zip64_sizes = false;
  bool descriptors = true;
  size_t lie = static_cast<size_t>(-1);  // the record about which the directory lies
  uint64_t lie_value = 0;
  size_t lie_at = 0;  // the place in its entry
  size_t lie_width = 2;
};

std::string make_zip(const std::vector<std::pair<std::string, std::string>>& records,
                     const ZipForm& form) {
  std::string zip, directory;
  for (size_t i = 0; i < records.size(); ++i) {
    const auto& [short_name, content] = records[i];
    const std::string name = "archive/" + short_name;
    const uint32_t crc = crc32(content.data(), content.size());
    const uint64_t header = zip.size();
    const uint16_t flags = kUtf8 | (form.descriptors ? kHasDescriptor : 0);
    const uint64_t bytes = form.zip64_sizes ? kIn64 : content.size();
    std::string extra;
    if (form.aligned) {
      const size_t data = zip.size() + kLocalHeaderBytes + name.size() + 4;
      const size_t fill = (64 - data % 64) % 64;
      extra = "FB" + little_endian(fill, 2) + std::string(fill, 'Z');
    }
    zip += little_endian(kLocalHeader, 4) + little_endian(0, 2) + little_endian(flags, 2) +
           std::string(6, '\0') + little_endian(form.descriptors ? 0 : crc, 4) +
           little_endian(form.descriptors ? 0 : bytes, 4) +
           little_endian(form.descriptors ? 0 : bytes, 4) + little_endian(name.size(), 2) +
           little_endian(extra.size(), 2) + name + extra + content;
    if (form.descriptors) {
      zip += little_endian(kDescriptor, 4) + little_endian(crc, 4) +
             little_endian(content.size(), 4) + little_endian(content.size(), 4);
    }
    std::string wide;
    if (form.zip64_sizes) {
      wide = little_endian(kZip64Extra, 2) + little_endian(24, 2) +
             little_endian(content.size(), 8) + little_endian(content.size(), 8) +
             little_endian(header, 8);
    }
    std::string entry = little_endian(kEntry, 4) + std::string(4, '\0') + little_endian(flags, 2) +
                        std::string(6, '\0') + little_endian(crc, 4) + little_endian(bytes, 4) +
                        little_endian(bytes, 4) + little_endian(name.size(), 2) +
                        little_endian(wide.size(), 2) + std::string(10, '\0') +
                        little_endian(form.zip64_sizes ? kIn64 : header, 4) + name + wide;
    if (i == form.lie && form.lie_at + form.lie_width <= entry.size()) {
      put(entry, form.lie_at, form.lie_value, form.lie_width);
    }
    directory += entry;
  }
  const uint64_t begin = zip.size();
  zip += directory;
  if (form.zip64_end) {
    const uint64_t end64 = zip.size();
    zip += little_endian(kEnd64, 4) + little_endian(44, 8) + std::string(12, '\0') +
           little_endian(records.size(), 8) + little_endian(records.size(), 8) +
           little_endian(directory.size(), 8) + little_endian(begin, 8) +
           little_endian(kLocator64, 4) + little_endian(0, 4) + little_endian(end64, 8) +
           little_endian(1, 4);
  }
  return zip + little_endian(kEnd, 4) + std::string(4, '\0') + little_endian(records.size(), 2) +
         little_endian(records.size(), 2) + little_endian(directory.size(), 4) +
         little_endian(begin, 4) + little_endian(0, 2);
}

// A number of one of the zip's headers: near its signature.
void change_header(std::string& zip, Random& random) {
  static constexpr const char* kSignatures[] = {"PK\1\2", "PK\1\2", "PK\3\4", "PK\5\6",
                                                "PK\6\6", "PK\6\7", "PK\7\10"};
  const char* signature = random.pick(kSignatures);
  std::vector<size_t> places;
  for (size_t at = zip.find(signature); at != std::string::npos; at = zip.find(signature, at + 4)) {
    places.push_back(at);
  }
  if (places.empty()) return;
  static constexpr size_t kWidths[] = {2, 2, 4, 8};
  change_number(zip, random.pick(places) + 4 + random.below(52), random.pick(kWidths), random);
}

// -- safetensors -------------------------------------------------------------------------------

constexpr size_t kLengthBytes = 8;
constexpr const char* kTokens[] = {
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "\"",
    "null",
    "true",
    "-1",
    "1.5",
    "1e400",
    "{}",
    "[]",
    "\"\"",
    "\\u0000",
    "\"dtype\"",
    "\"shape\"",
    "\"F4\"",
    "\"F32\"",
    "\"data_offsets\"",
    "\"__metadata__\"",
    "\\ud800",
    "\xff",
    "\"BOOL\"",
    "\"F64\"",
    " ",
    "\n",
    "0",
    "00",
    "\"k\":\"v\",",
    "\"x\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]},",
    "\"shape\":[1,1],",
    // Products that are 0 in 64 bits, and more dims than a tensor has.
    "\"y\":{\"dtype\":\"U8\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,0]},",
    "\"z\":{\"dtype\":\"F64\",\"shape\":[2305843009213693952],\"data_offsets\":[0,0]},",
    "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,",
    "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,"
    "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,",
};

// Another number, or another place for a token.
void change_json(std::string& json, Random& random) {
  const size_t from = random.below(json.size());
  const auto digit = json.find_first_of("0123456789", from);
  if (random.one_in(2) && digit != std::string::npos) {
    const auto end = std::min(json.find_first_not_of("0123456789", digit), json.size());
    const auto value = odd_number(random, std::strtoull(json.c_str() + digit, nullptr, 10), 100);
    json.replace(digit, end - digit, std::to_string(value));
    return;
  }
  const std::string token = random.pick(kTokens);
  if (token.back() == ',' && token.size() > 1 && random.one_in(2)) {  // where it fits
    const auto place = json.find(token[0] == '"' ? '{' : '[', token[0] == '"' ? 0 : from);
    if (place != std::string::npos) json.insert(place + 1, token);
    return;
  }
  const auto place = std::min(json.find_first_of("{}[],:\"", from), json.size());
  json.replace(place, random.below(3), token);
}

}  // namespace

std::string make_zip(const std::vector<std::pair<std::string, std::string>>& records) {
  return make_zip(records, ZipForm());
}

void Mutator::change_bytes(std::string& bytes, Random& random) const {
  const size_t size = bytes.size();
  const size_t at = random.below(size);
  const size_t piece = 1 + random.below(std::min<size_t>(size - at, random.one_in(4) ? size : 16));
  static constexpr uint8_t kBytes[] = {0,   1,   2,   9,   '\n', ' ', '"', '(',  ')',  '.',  '/',
                                       '0', 'N', 'R', ']', '}',  't', 'Q', 0x7f, 0x80, 0xc3, 0xff};
  switch (random.below(12)) {
    case 0:
    case 1:
      bytes[at] = static_cast<char>(bytes[at] ^ (1 << random.below(8)));
      break;
    case 2:
      bytes[at] = static_cast<char>(random.pick(kBytes));
      break;
    case 3:
      bytes[at] = static_cast<char>(random.next());
      break;
    case 4:
      bytes.erase(at, piece);
      break;
    case 5:
      bytes.insert(random.below(size), bytes.substr(at, piece));
      break;
    case 6: {
      const std::string& other = random.pick(seeds_).bytes;
      bytes.insert(at, other, random.below(other.size()), 1 + random.below(64));
      break;
    }
    case 7: {
      const std::string& other = random.pick(seeds_).bytes;
      const size_t from = random.below(other.size());
      bytes.replace(at, piece, other, from, piece);
      break;
    }
    case 8:
      if (random.one_in(3)) bytes.resize(at);
      break;
    default: {
      static constexpr size_t kWidths[] = {2, 4, 4, 8};
      change_number(bytes, at, random.pick(kWidths), random);
    }
  }
}

std::string Mutator::mutate_bytes(std::string bytes, Random& random) const {
  size_t changes = 1 + random.below(random.one_in(3) ? 12 : 3);
  for (; changes > 0 && !bytes.empty() && bytes.size() < kMostBytes; --changes) {
    change_bytes(bytes, random);
  }
  return bytes;
}

void Mutator::change_pickle(std::string& bytes, Random& random) const {
  const auto steps = steps_of(bytes);
  const Step& step = random.pick(steps);
  const Step& other = random.pick(steps);
  const size_t step_bytes = step.end - step.begin;
  switch (random.below(13)) {
    case 0: {  // one, or some
      const size_t first = static_cast<size_t>(&step - steps.data());
      const size_t last = first + (random.one_in(2) ? 0 : random.below(24));
      bytes.erase(step.begin, steps[std::min(last, steps.size() - 1)].end - step.begin);
      break;
    }
    case 1:  // several, somewhere else
      bytes.insert(other.begin, bytes.substr(step.begin, step_bytes + random.below(100)));
      break;
    case 2:
      bytes.replace(step.begin, step_bytes, random_step(random));
      break;
    case 3:
      bytes.insert(step.begin, random_step(random));
      break;
    case 4:
    case 5: {
      const size_t width = step.form.bytes + step.form.length;
      const size_t content = step.begin + 1 + width;
      if (width == 0) break;
      if (step.form.length != 0 && content <= bytes.size() && random.one_in(2)) {
        // All that is left, or a byte more or less.
        put(bytes, step.begin + 1, bytes.size() - content + 1 - random.below(3), width);
      } else {
        change_number(bytes, step.begin + 1, width, random);
      }
      break;
    }
    case 6: {
      const auto text = bytes.substr(other.begin, other.end - other.begin);
      bytes.replace(step.begin, step_bytes, text);
      break;
    }
    case 7: {  // the next global
      const auto global = std::find_if(steps.begin() + (&step - steps.data()), steps.end(),
                                       [](const Step& each) { return each.form.lines != 0; });
      if (global == steps.end()) break;
      bytes.replace(global->begin, global->end - global->begin,
                    std::string("c") + random.pick(kGlobals) + "\n");
      break;
    }
    case 8: {  // of another pickle
      const Input& seed = random.pick(seeds_);
      if (seed.format != Format::kPickle && seed.format != Format::kDcpMetadata) break;
      const auto its_steps = steps_of(seed.bytes);
      const size_t begin = random.pick(its_steps).begin;
      bytes.insert(step.begin, seed.bytes, begin, 1 + random.below(200));
      break;
    }
    case 9: {  // again and again
      const auto text = bytes.substr(step.begin, std::min<size_t>(step_bytes, 40));
      std::string many;
      for (size_t times = random.below(random.one_in(8) ? 1000 : 20); times > 0; --times) {
        many += text;
      }
      bytes.insert(step.begin, many);
      break;
    }
    case 10: {  // the next int becomes one of 64 bits
      const auto is_int = [&](const Step& each) {
        const auto opcode = static_cast<uint8_t>(bytes[each.begin]);
        return opcode == pickle_opcode::kBinInt || opcode == pickle_opcode::kBinInt1 ||
               opcode == pickle_opcode::kBinInt2 || opcode == pickle_opcode::kLong1;
      };
      const auto found = std::find_if(steps.begin() + (&step - steps.data()), steps.end(), is_int);
      if (found == steps.end()) break;
      bytes.replace(found->begin, found->end - found->begin,
                    "\x8a\x08" + little_endian(odd_number(random, 8, bytes.size()), 8));
      break;
    }
    case 11:  // ends within
      if (random.one_in(3)) bytes.resize(step.begin + 1 + random.below(step_bytes));
      break;
    default:
      change_bytes(bytes, random);
  }
}

std::string Mutator::mutate_pickle(std::string bytes, Random& random) const {
  size_t changes = 1 + random.below(random.one_in(4) ? 8 : 2);
  for (; changes > 0 && !bytes.empty() && bytes.size() < kMostBytes; --changes) {
    change_pickle(bytes, random);
  }
  return bytes;
}

void Mutator::change_records(Zip& records, Random& random) const {
  auto& [name, content] = records[random.below(records.size())];
  switch (random.below(6)) {
    case 0:
      content = mutate_bytes(content, random);
      break;
    case 1:
      content.resize(content.size() / 2 + random.below(content.size() + 2), 'x');
      break;
    case 2:
      name = random.one_in(2) ? mutate_bytes(name, random) : random.pick(records).first;
      break;
    case 3:
      if (records.size() > 1) records.erase(records.begin() + random.below(records.size()));
      break;
    case 4: {
      auto copy = random.pick(records);
      copy.first += random.pick(kWords);
      records.insert(records.begin() + random.below(records.size()), std::move(copy));
      break;
    }
    default:
      std::swap(content, records[random.below(records.size())].second);
  }
}

std::string Mutator::mutate_zip(std::string bytes, Random& random) const {
  if (random.one_in(4)) return mutate_bytes(std::move(bytes), random);
  if (random.one_in(4)) {
    for (size_t changes = 1 + random.below(3); changes > 0; --changes) change_header(bytes, random);
    return bytes;
  }
  Zip records = records_of(bytes);
  if (records.empty()) return mutate_bytes(std::move(bytes), random);
  for (auto& [name, content] : records) {
    if (name == "data.pkl" && !random.one_in(8)) content = mutate_pickle(content, random);
  }
  if (random.one_in(4)) change_records(records, random);
  ZipForm form;
  form.aligned = !random.one_in(8);
  form.zip64_end = !random.one_in(4);
  form.zip64_sizes = random.one_in(8);
  form.descriptors = !random.one_in(4);
  if (random.one_in(8)) {
    static constexpr size_t kWidths[] = {2, 4, 8};
    form.lie = random.below(records.size());
    form.lie_value = odd_number(random, random.below(1000), bytes.size());
    form.lie_at = random.below(80);
    form.lie_width = random.pick(kWidths);
  }
  return make_zip(records, form);
}

std::string Mutator::mutate_safetensors(std::string bytes, Random& random) const {
  if (bytes.size() < kLengthBytes || random.one_in(6)) return mutate_bytes(bytes, random);
  const auto length = std::min<uint64_t>(get(bytes, 0, kLengthBytes), bytes.size() - kLengthBytes);
  auto json = bytes.substr(kLengthBytes, length);
  auto data = bytes.substr(kLengthBytes + length);
  for (size_t changes = 1 + random.below(4); changes > 0 && !json.empty(); --changes) {
    if (random.one_in(3)) {
      change_bytes(json, random);
    } else {
      change_json(json, random);
    }
  }
  if (random.one_in(4)) data.resize(data.size() / 2 + random.below(data.size() + 2), 'x');
  const bool fits = !random.one_in(8);
  const uint64_t said = fits ? json.size() : odd_number(random, json.size(), bytes.size());
  return little_endian(said, kLengthBytes) + json + data;
}

std::string Mutator::mutate(Format format, std::string bytes, Random& random) const {
  if (bytes.empty()) return bytes;
  switch (format) {
    case Format::kTorchFile:
      return mutate_zip(std::move(bytes), random);
    case Format::kSafetensors:
      return mutate_safetensors(std::move(bytes), random);
    default:
      return random.one_in(6) ? mutate_bytes(std::move(bytes), random)
                              : mutate_pickle(std::move(bytes), random);
  }
}

Input Mutator::make(uint64_t number) const {
  Random random(number);
  Input mutant = random.pick(seeds_);
  mutant.bytes = mutate(mutant.format, std::move(mutant.bytes), random);
  mutant.name = "mutant " + std::to_string(number) + " of " + mutant.name;
  return mutant;
}

}  // namespace lightning::fuzz
