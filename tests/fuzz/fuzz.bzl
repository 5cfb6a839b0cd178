"""Programs with the sanitizers in them: of what reads checkpoints without LibTorch, and no more."""

_SANITIZERS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
]

# The readers are compiled once more, so that no other program pays for it.
_SOURCES = [
    ":fuzz_sources",
    "//lightning:errors_sources",
    "//lightning/checkpoint:sources_without_torch",
]

def fuzz_test(name, srcs, **kwargs):
    """A Catch2 program of the readers under the address and the undefined-behaviour sanitizer.

    Args:
      name: ends in _test.
      srcs: its sources beside the readers and :fuzz_sources.
      **kwargs: as for cc_test.
    """
    native.cc_test(
        name = name,
        srcs = srcs + _SOURCES,
        copts = _SANITIZERS + [
            "-O1",
            "-g1",
            "-fno-omit-frame-pointer",
        ],
        linkopts = _SANITIZERS + ["-lpthread"],
        data = ["//tests/fuzz:seeds"],
        deps = [
            "//tests:main",
            "@debian//:catch2",
            "@debian//:nlohmann_json",
        ],
        **kwargs
    )

def libfuzzer(name, src):
    """A program of libFuzzer, which comes with clang; build it by name, no pattern takes it along."""
    native.genrule(
        name = name + "_build",
        outs = [name],
        srcs = [src] + _SOURCES,
        executable = True,
        local = True,
        message = "Compiling with clang++",
        tags = ["manual"],
        testonly = True,
        cmd = """
if ! which clang++ >/dev/null; then
  echo "libFuzzer comes with clang, which is not installed. Run apt-get install clang." >&2
  exit 1
fi
sources=$$(for file in $(SRCS); do case $$file in *.cc) echo $$file;; esac; done)
clang++ -std=c++17 -O1 -g -I. -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \\
  $$sources -lpthread -o $@
""",
    )
