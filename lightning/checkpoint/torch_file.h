// State trees in the files of torch.save, both ways.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <unordered_map>
#include <vector>

#include "lightning/checkpoint/mapped_file.h"
#include "lightning/checkpoint/state.h"
#include "lightning/checkpoint/torch_archive.h"
#include "lightning/checkpoint/zip_writer.h"

namespace lightning {

// Everything of the file as a tree. Objects that mean nothing here are State::Object; sparse,
// quantized and meta tensors are too. Tensors lie in the mapped file: they cost nothing until they
// are touched, writing to one changes this process's copy alone, and they keep the mapping alive.
// Tensors that share a storage in the file share one here.
//
//   verify   compares the CRC of every record, which reads the whole file
// Errors: CheckpointError with the file's name for one that is torn or of another format, for
// values that refer to themselves, and for a tree that is larger than its file warrants.
State read_torch_file(const std::string& path, bool verify = true);
State read_torch_archive(const TorchArchive& archive);

// Stands in a tree for tensors that are never in memory as a whole: their bytes are read, a few MB
// at a time, while they are written.
class DistantTensors {
 public:
  // Fills `buffer` with the bytes from `offset` on, in row-major order; on several threads.
  using Read = std::function<void(uint64_t offset, uint64_t bytes, void* buffer)>;

  // A contiguous tensor without memory, which nothing but the writer may use.
  at::Tensor add(const std::vector<int64_t>& sizes, at::ScalarType dtype, Read read);
  // Null for a tensor that is here.
  const Read* find(const c10::StorageImpl* storage) const;

 private:
  std::unordered_map<const c10::StorageImpl*, Read> reads_;
};

// What torch.load(weights_only=True) reads, and of the same types. So are plain data that Python
// reads only with weights_only=False: numpy's scalars and arrays, frozensets, ints beyond 255
// bytes. Lightning's AttributeDict becomes a dict, as there. Tensors that share a storage share it
// in the file, of which only the part in use is written. Tensors of a device are copied piece by
// piece; the state is never copied whole. Who writes them on streams of their own waits for these
// before.
//
// Errors: CheckpointError that names the entry for a tensor in chunks, without values (meta),
// sparse or quantized, a text that is not UTF-8, and an object that torch.load would refuse or that
// would run code (functions, classes of other programs); those of the disk, with the bytes needed.
// The file is complete or not there.
//
//   distant   the tensors of the tree whose values are elsewhere
void write_torch_file(const State& state, const std::string& path,
                      const DistantTensors* distant = nullptr);

// The same as parts, for files that hold several. Keeps the tensors alive, not their values: they
// are read when it writes.
ZipWriter torch_file_writer(const State& state, const std::string& folder = "archive",
                            const DistantTensors* distant = nullptr);

}  // namespace lightning
