#include "lightning/checkpoint/dtype.h"

#include <catch2/catch.hpp>
#include <string>

#include "lightning/errors.h"
#include "tests/support/python.h"

using namespace lightning;
using lightning::testing::run_python;

namespace {

std::string known_dtypes() {
  std::string text;
  for (int i = 0; i <= static_cast<int>(DType::kFloat8E8M0FNU); ++i) {
    const auto& known = info(static_cast<DType>(i));
    text += str(known.torch_name, ' ', known.bytes, " [", known.storage, "] [", known.safetensors,
                "]\n");
  }
  return text;
}

}  // namespace

TEST_CASE("every element type has torch's name, size and storage and safetensors' name",
          "[checkpoint]") {
  const std::string script = R"(
import json, sys, torch
from safetensors.torch import save

def safetensors_name(dtype):
    try:
        file = save({"x": torch.zeros(1, dtype=torch.uint8).repeat(dtype.itemsize).view(dtype)})
    except Exception:
        return ""
    return json.loads(file[8:8 + int.from_bytes(file[:8], "little")])["x"]["dtype"]

storages = torch.storage._dtype_to_storage_type_map()
for line in sys.argv[1].splitlines():
    name = line.split()[0]
    dtype = getattr(torch, name)
    print(name, dtype.itemsize, f"[{storages.get(dtype, '')}]", f"[{safetensors_name(dtype)}]")
)";
  CHECK(run_python(script, {known_dtypes()}) == known_dtypes());
}

TEST_CASE("an element type is found by each of its names, and by no other", "[checkpoint]") {
  for (int i = 0; i <= static_cast<int>(DType::kFloat8E8M0FNU); ++i) {
    const auto& known = info(static_cast<DType>(i));
    CHECK(known.dtype == static_cast<DType>(i));
    CHECK(dtype_of_torch_name(known.torch_name) == known.dtype);
    if (!known.storage.empty()) CHECK(dtype_of_storage(known.storage) == known.dtype);
    if (!known.safetensors.empty()) CHECK(dtype_of_safetensors(known.safetensors) == known.dtype);
  }
  CHECK_FALSE(dtype_of_torch_name("FloatStorage"));
  CHECK_FALSE(dtype_of_storage("UntypedStorage"));
  CHECK_FALSE(dtype_of_storage(""));  // several have none
  CHECK_FALSE(dtype_of_safetensors(""));
  CHECK_FALSE(dtype_of_safetensors("f32"));
}
