"""CUDA's compiler as @cuda, and the rule for what it compiles.

Kernels are built where an nvcc is found and LibTorch is a build with CUDA; where not, a cuda_library
holds its headers alone and LIGHTNING_CUDA_KERNELS is 0, so that callers compile without them. The
compiler is $NVCC, else the one of the PATH, of /usr/local/cuda, or of PyPI's nvidia-cuda-nvcc beside
torch.
"""

load("@cuda//:defs.bzl", "CUDA_FLAGS", "CUTLASS_FLAGS", "NVCC")

def cuda_library(name, srcs, hdrs, deps = [], by_cutlass = False, **kwargs):
    """Kernels behind a C++ interface.

    Args:
      name: of the library.
      srcs: .cu files, each compiled by itself, and the .cuh files they include.
      hdrs: what callers include; without CUDA's or LibTorch's headers, which would cost every
        architecture a minute.
      deps: C++ libraries.
      by_cutlass: made of NVIDIA's CUTLASS for Hopper alone: built where its headers are too, and
        LIGHTNING_CUTLASS tells.
      **kwargs: as for cc_library.
    """
    objects = []
    flags = CUTLASS_FLAGS if by_cutlass else CUDA_FLAGS
    if NVCC and flags:
        for src in [one for one in srcs if one.endswith(".cu")]:
            objects.append(src[:-3] + ".cu.o")
            native.genrule(
                name = name + "_" + src[:-3] + "_object",
                srcs = [src] + [one for one in srcs if one.endswith(".cuh")] + hdrs + ["//lightning/cuda:shared"],
                outs = [objects[-1]],
                cmd = "'{}' {} -I. -c $(location {}) -o $@".format(NVCC, flags, src),
                message = "Compiling",
            )
    native.cc_library(
        name = name,
        srcs = objects,
        hdrs = hdrs,
        defines = ["LIGHTNING_CUDA_KERNELS=%d" % (1 if NVCC else 0)] +
                  (["LIGHTNING_CUTLASS=%d" % (1 if objects else 0)] if by_cutlass else []),
        deps = deps + ["@libtorch"],
        **kwargs
    )
