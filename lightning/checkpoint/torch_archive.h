// A file of torch.save as it lies on the disk: the zip, its pickle, and what each tensor in it
// claims to be, checked against the record that holds its bytes. Makes no tensor and needs no
// LibTorch, so that a fuzzer can run all of it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "lightning/checkpoint/dtype.h"
#include "lightning/checkpoint/pickle_reader.h"
#include "lightning/checkpoint/zip_reader.h"

namespace lightning {

// A tensor of the pickle. All numbers are checked: none is negative, sizes and strides are as many,
// at most 64, and every element lies in its storage (of a tensor without elements the offset may
// not). Strides of 0 let a few bytes claim up to 2^63 bytes of elements: whoever copies bounds it.
struct TensorRecord {
  DType dtype = DType::kFloat32;
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;  // in elements
  int64_t storage_offset = 0;    // in elements
  const ZipReader::Record* storage = nullptr;
  uint64_t storage_bytes = 0;  // that tensors may use; the record has as many or more
  bool requires_grad = false;
  bool is_parameter = false;
  bool conjugate = false;
  bool negative = false;
};

class TorchArchive {
 public:
  //   verify   compares the CRC of every record
  // Errors: CheckpointError with the file's name; files of torch before 1.6, of TorchScript and
  // zips without a pickle are told apart.
  TorchArchive(std::shared_ptr<MappedFile> file, bool verify);
  TorchArchive(std::shared_ptr<MappedFile> file, uint64_t begin, uint64_t bytes, bool verify);

  const ZipReader& zip() const { return zip_; }
  const PickleNode& root() const { return pickle_->root(); }

  // Whether a node is a strided tensor or a Parameter, and what it claims. One of a subclass, or
  // with attributes, counts as the tensor inside. Sparse, quantized, nested and meta tensors do
  // not count: they stay calls as other objects do.
  // Errors of record(): CheckpointError with the file's name for a claim that does not hold.
  static bool is_tensor(const PickleNode& node);
  TensorRecord record(const PickleNode& node) const;

 private:
  void index_storages();
  const ZipReader::Record* find_storage(std::string_view key) const;

  ZipReader zip_;
  std::string where_;  // the file, for messages
  std::unique_ptr<Pickle> pickle_;
  std::vector<const ZipReader::Record*> storages_;  // data/0, data/1, ...; null for those missing
};

}  // namespace lightning
