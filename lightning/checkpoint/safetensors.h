// Files of the safetensors format: named tensors and a map of strings, nothing that runs.
//
//   bytes 0..7    N, the length of the header, little-endian
//   N bytes       JSON {"__metadata__": {str: str}, name: {"dtype": "F32", "shape": [2, 3],
//                 "data_offsets": [begin, end]}}, padded with spaces to a multiple of 8
//   the rest      the tensors, row-major and little-endian, without holes; offsets count from here
//
// Source: huggingface.co/docs/safetensors, "Format"; checked against safetensors 0.8.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "lightning/checkpoint/safetensors_header.h"

namespace lightning {

struct SafetensorsContent {
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  std::map<std::string, std::string> metadata;
};

// Writes the tensors from whatever device and strides they have: those that lie row by row on the
// host from where they are, with several threads, the others by one host copy at a time. Wide
// dtypes come first, so that all are aligned. The file is complete or not there (AtomicFile).
//
// Errors: CheckpointError for a name that is taken twice or "__metadata__", for a dtype or layout
// that the format does not know (with the name), for text that is not UTF-8, and for the disk's.
void write_safetensors(const std::string& path, const SafetensorsContent& content);

// All tensors, in the order of their data. They lie in the mapped file: pages are read when they
// are touched, and what is written to them stays in this process. One that the file does not align
// is copied.
//
// Errors: CheckpointError for a file that is missing, cut short or not of this format. Every length
// is checked against the file's size before it is used.
SafetensorsContent read_safetensors(const std::string& path);

// The header alone, which makes no tensor: names, dtypes, shapes, metadata.
//
//   check_values   looks at the values too, as far as read_safetensors() does
// Errors: as read_safetensors().
SafetensorsHeader read_safetensors_header(const std::string& path, bool check_values = false);

}  // namespace lightning
