#include "lightning/checkpoint/known_objects.h"

#include <string>
#include <unordered_set>

#include "lightning/checkpoint/dtype.h"
#include "lightning/errors.h"

namespace lightning {
namespace {

// Classes and values that are only named. Source: torch/_weights_only_unpickler.py, and numpy's.
const std::unordered_set<std::string>& known_globals() {
  static const std::unordered_set<std::string> names = [] {
    std::unordered_set<std::string> all = {"builtins.bytearray",
                                           "builtins.complex",
                                           "builtins.set",
                                           "collections.Counter",
                                           "collections.OrderedDict",
                                           "numpy.dtype",
                                           "numpy.ndarray",
                                           "torch.Size",
                                           "torch.Tensor",
                                           "torch.bits16",
                                           "torch.bits1x8",
                                           "torch.bits2x4",
                                           "torch.bits4x2",
                                           "torch.bits8",
                                           "torch.device",
                                           "torch.float4_e2m1fn_x2",
                                           "torch.nn.parameter.Parameter",
                                           "torch.per_channel_affine",
                                           "torch.per_channel_affine_float_qparams",
                                           "torch.per_channel_symmetric",
                                           "torch.per_tensor_affine",
                                           "torch.per_tensor_symmetric",
                                           "torch.qint32",
                                           "torch.qint8",
                                           "torch.quint2x4",
                                           "torch.quint4x2",
                                           "torch.quint8"};
    for (int dtype = 0; dtype <= static_cast<int>(DType::kFloat8E8M0FNU); ++dtype) {
      all.insert("torch." + std::string(info(static_cast<DType>(dtype)).torch_name));
    }
    for (int bits = 1; bits < 8; ++bits) {
      all.insert(str("torch.int", bits));
      all.insert(str("torch.uint", bits));
    }
    return all;
  }();
  return names;
}

// Functions that make plain values of plain values.
const std::unordered_set<std::string>& known_calls() {
  static const std::unordered_set<std::string> names = {
      "numpy._core.multiarray._reconstruct",
      "numpy._core.multiarray.scalar",
      "numpy.core.multiarray._reconstruct",
      "numpy.core.multiarray.scalar",
      "numpy.dtype",
      "torch.Size",
      "torch._utils._rebuild_meta_tensor_no_storage",
      "torch._utils._rebuild_sparse_tensor",
      "torch.device",
      "torch.serialization._get_layout"};
  return names;
}

}  // namespace

bool torch_load_takes(const State::Object& object) {
  const auto name = object.full_name();
  if (object.how == State::Object::How::kGlobal) return known_globals().count(name) > 0;
  return object.how == State::Object::How::kCall && object.items.empty() &&
         object.entries.size() == 0 && known_calls().count(name) > 0;
}

}  // namespace lightning
