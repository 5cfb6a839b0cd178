"""The rule for a test program: Catch2 with our main, LibTorch, and the environment it runs in."""

load("@libtorch//:defs.bzl", "TORCH_PYTHON")

def lightning_test(name, srcs, deps = [], data = [], tags = [], size = "medium", env = {}, **kwargs):
    """A Catch2 test program.

    It runs with one OpenMP thread; LIGHTNING_PYTHON is the absolute path of the interpreter that has
    torch (and, under `make test`, Lightning).

    Args:
      name: ends in _test.
      srcs: the test's sources; //tests:main supplies main().
      deps: what is tested; Catch2 and LibTorch are there already.
      data: files it reads at run time, found relative to the working directory.
      tags: "long" keeps a test out of `make test`; "exclusive" runs it alone.
      size: small, medium, large or enormous: 1, 5, 15 or 60 minutes before it counts as hung.
      env: further environment variables.
      **kwargs: as for cc_test.
    """
    environment = {
        "LIGHTNING_PYTHON": TORCH_PYTHON,
        "OMP_NUM_THREADS": "1",
    }
    environment.update(env)
    native.cc_test(
        name = name,
        size = size,
        srcs = srcs,
        data = data,
        env = environment,
        tags = tags,
        # LibTorch has a macro CHECK too: seen first, it gives way to Catch's.
        copts = ["-include", "c10/util/Logging.h"],
        deps = deps + [
            "//tests:main",
            "@debian//:catch2",
            "@libtorch",
        ],
        **kwargs
    )
