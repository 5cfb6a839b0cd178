"""Debian's libraries as @debian//:NAME.

Their headers are under /usr/include, which Bazel's toolchain takes as built in, so a target holds
only what the linker needs. `make setup` installs the packages.
"""

# Target, a header that shows that the package is there, what to link.
_LIBRARIES = [
    ("catch2", "catch2/catch.hpp", []),
    ("cli11", "CLI/CLI.hpp", []),
    ("gloo", "gloo/config.h", []),  # headers alone: LibTorch has the library
    ("nlohmann_json", "nlohmann/json.hpp", []),
    ("png", "png.h", ["-lpng"]),
    ("yaml-cpp", "yaml-cpp/yaml.h", ["-lyaml-cpp"]),
    ("zlib", "zlib.h", ["-lz"]),
]

def _debian_impl(rctx):
    rules = ['package(default_visibility = ["//visibility:public"])\n']
    for name, header, linkopts in _LIBRARIES:
        if not rctx.path("/usr/include/" + header).exists:
            fail("@debian//:{} needs /usr/include/{}, which is not there. Run `make setup`.".format(name, header))
        rules.append('cc_library(name = "{}", linkopts = {})\n'.format(name, repr(linkopts)))
    rctx.file("BUILD.bazel", "".join(rules))

debian = repository_rule(
    implementation = _debian_impl,
    local = True,
)
