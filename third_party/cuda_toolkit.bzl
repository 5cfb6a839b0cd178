"""Finds CUDA's compiler for cuda.bzl: @cuda//:defs.bzl has NVCC, "" where there is none.

Beside it CUDA_FLAGS, and CUTLASS_FLAGS for what is made of CUTLASS, "" where its headers, PyPI's
nvidia-cutlass, are not beside torch.
"""

# Ampere and its successors up to Hopper, PTX for those after, and what is Hopper's own. Hopper code
# is built for what it is: without the `a` its matrix and copy instructions are not there.
_ARCHITECTURES = [
    "arch=compute_80,code=sm_80",
    "arch=compute_80,code=compute_80",
    "arch=compute_90a,code=sm_90a",
]

_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-Wall,-Wextra", "-DNDEBUG"]

# CUTLASS speaks of Hopper's own instructions only; its headers are not ours to warn of.
_CUTLASS_FLAGS = [
    "-gencode=arch=compute_90a,code=sm_90a",
    "--expt-relaxed-constexpr",
]

# The release of CUDA that LibTorch is built for; objects of another do not link with its runtime.
_RELEASE = "release 13."

def _is_of_our_release(rctx, nvcc):
    result = rctx.execute([nvcc, "--version"])
    return result.return_code == 0 and _RELEASE in result.stdout

def _cuda_impl(rctx):
    # Read, not loaded: WORKSPACE defines both repositories at once.
    torch = rctx.read(Label("@libtorch//:defs.bzl"))
    torch_lib_dir = torch.split("TORCH_LIB_DIR = \"")[1].split("\"")[0]
    candidates = [
        rctx.os.environ.get("NVCC"),
        rctx.which("nvcc"),
        "/usr/local/cuda/bin/nvcc",
        torch_lib_dir + "/../../nvidia/cu13/bin/nvcc",
    ]
    nvcc = ""
    for candidate in candidates if "TORCH_CUDA = True" in torch else []:
        if candidate and rctx.path(str(candidate)).exists and _is_of_our_release(rctx, str(candidate)):
            nvcc = str(candidate)
            break
    flags = _FLAGS + ["-gencode=" + one for one in _ARCHITECTURES]
    cutlass = torch_lib_dir + "/../../cutlass_library/source/include"
    cutlass_flags = []
    if rctx.path(cutlass + "/cutlass/cutlass.h").exists:
        cutlass_flags = _FLAGS + _CUTLASS_FLAGS + ["-isystem", cutlass]
    rctx.file("BUILD.bazel", "")
    rctx.file("defs.bzl", "NVCC = \"{}\"\nCUDA_FLAGS = \"{}\"\nCUTLASS_FLAGS = \"{}\"\n".format(
        nvcc,
        " ".join(flags),
        " ".join(cutlass_flags),
    ))
    if not nvcc:
        # Told once at the start of a build; everything else is built.
        print("No nvcc of CUDA 13 was found: the CUDA kernels are left out.")  # buildifier: disable=print

cuda_toolkit = repository_rule(
    implementation = _cuda_impl,
    environ = ["NVCC", "PATH"],
    local = True,
)
