"""LibTorch as @libtorch, taken from the torch package of a Python environment.

The interpreter is .venv/bin/python of this repository (`make setup` makes it), else $TORCH_PYTHON,
else python3. Only headers are linked into the repository; libraries are found by -L and rpath,
which spares Bazel the hashing of a gigabyte. On another machine with the same torch,
LD_LIBRARY_PATH=<torch>/lib goes before that rpath (and the lib folders of nvidia/cu13, nvidia/cudnn
and nvidia/nccl beside it, for a program that calls CUDA's runtime, cuBLASLt, cuDNN or NCCL itself).

Targets and files:
  @libtorch             cc_library: headers as system includes, so that our warnings are ours alone
  @libtorch//:cudnn     cc_library: the cuDNN that LibTorch loads, with its C++ frontend; empty where
                        TORCH_CUDNN is False
  @libtorch//:defs.bzl  TORCH_PYTHON (absolute path of the interpreter), TORCH_LIB_DIR,
                        TORCH_VERSION, TORCH_CUDA (is this a build with CUDA?) and TORCH_CUDNN (are
                        the headers of cuDNN and of its frontend there?)
"""

# torch/include also holds the headers of a protobuf that is not Debian's, which no torch header
# includes, and pybind11, which wants Python's own. Without them neither can be taken by accident.
_UNWANTED_HEADERS = ["google", "pybind11"]

_FIND_TORCH = """
import importlib.util, os, re, sys
spec = importlib.util.find_spec("torch")  # found, not imported: that would take seconds
if spec is None:
    sys.exit("no module named torch")
root = os.path.dirname(spec.origin)
print(root)
print(re.search("__version__ = '(.*)'", open(os.path.join(root, "version.py")).read()).group(1))
"""

_BUILD = """\
cc_library(
    name = "libtorch",
    hdrs = glob(["include/**", "cuda/**", "nccl/**"], allow_empty = True),
    defines = {defines},
    includes = {includes},
    linkopts = {linkopts},
    visibility = ["//visibility:public"],
)

cc_library(
    name = "cudnn",
    hdrs = glob(["cudnn/**"], allow_empty = True),
    includes = ["cudnn/include"],
    linkopts = {cudnn_linkopts},
    visibility = ["//visibility:public"],
    deps = [":libtorch"],
)
"""

_DEFS = """\
TORCH_PYTHON = "{python}"
TORCH_LIB_DIR = "{lib_dir}"
TORCH_VERSION = "{version}"
TORCH_CUDA = {cuda}
TORCH_CUDNN = {cudnn}
"""

def _python(rctx):
    venv = str(rctx.path(Label("//:WORKSPACE")).dirname) + "/.venv/bin/python"
    if rctx.path(venv).exists:
        return venv
    if rctx.os.environ.get("TORCH_PYTHON"):
        return rctx.os.environ["TORCH_PYTHON"]
    return str(rctx.which("python3") or "python3")

def _link_libraries(lib_dir, names):
    """The linkopts of a folder's libraries whose names begin so."""
    linkopts = ["-L%s" % lib_dir, "-Wl,-rpath,%s" % lib_dir]
    for file in lib_dir.readdir():
        if any([file.basename.startswith(one) for one in names]):
            linkopts.append("-l:" + file.basename)  # pip's packages have no unversioned name
    return linkopts

def _link_cuda(rctx, nvidia):
    """Links the CUDA and NCCL headers that torch's own headers include.

    Returns the folders' names here, and what a program that calls these libraries itself links.
    """
    folders = []
    linkopts = []
    if not nvidia.exists:
        return folders, linkopts
    for name, header, libraries in [
        ("cuda", "cuda_runtime_api.h", ["libcudart.so.", "libcublasLt.so."]),
        ("nccl", "nccl.h", ["libnccl.so."]),
    ]:
        for package in nvidia.readdir():
            include = package.get_child("include")
            if not include.get_child(header).exists:
                continue
            rctx.symlink(include, name)
            folders.append(name)
            linkopts += _link_libraries(package.get_child("lib"), libraries)
            break
    return folders, linkopts

def _link_cudnn(rctx, packages):
    """Links the headers of cuDNN and of its frontend; returns linkopts, empty where one is missing."""
    cudnn = packages.get_child("nvidia").get_child("cudnn")
    frontend = packages.get_child("include")
    if not cudnn.get_child("include").exists or not frontend.get_child("cudnn_frontend.h").exists:
        return []
    for folder in [cudnn.get_child("include"), frontend]:
        for child in folder.readdir():
            if child.basename.startswith("cudnn"):
                rctx.symlink(child, "cudnn/include/" + child.basename)  # they name that folder
    return _link_libraries(cudnn.get_child("lib"), ["libcudnn.so."])

def _libtorch_impl(rctx):
    python = _python(rctx)
    result = rctx.execute([python, "-c", _FIND_TORCH])
    if result.return_code != 0:
        fail("Looked for LibTorch with {} and found none ({}). Expected the pip package of torch: run `make setup`, or set TORCH_PYTHON to an interpreter that has it.".format(
            python,
            result.stderr.strip(),
        ))
    torch, version = result.stdout.strip().split("\n")

    for child in rctx.path(torch + "/include").readdir():
        if child.basename not in _UNWANTED_HEADERS:
            rctx.symlink(child, "include/" + child.basename)

    lib_dir = torch + "/lib"
    cuda = rctx.path(lib_dir + "/libtorch_cuda.so").exists
    libs = ["torch", "torch_cpu", "c10"]
    includes = ["include", "include/torch/csrc/api/include"]
    defines = ["USE_C10D_GLOO"]
    cuda_linkopts = []
    cudnn_linkopts = []
    if cuda:
        libs += ["torch_cuda", "c10_cuda"]
        packages = rctx.path(torch).dirname
        folders, cuda_linkopts = _link_cuda(rctx, packages.get_child("nvidia"))
        cudnn_linkopts = _link_cudnn(rctx, packages)
        includes += folders
        if "nccl" in folders:
            defines.append("USE_C10D_NCCL")

    # Backends register themselves when they are loaded: as-needed would drop those that nothing
    # names. Their own dependencies are found by their own rpath, at run time.
    linkopts = ["-L" + lib_dir, "-Wl,-rpath," + lib_dir, "-Wl,--push-state,--no-as-needed"]
    # libtorch exports a std::filesystem of its own, whose remove_all crashes with ours: libstdc++
    # comes first, so that its symbols win.
    linkopts += ["-lstdc++"] + ["-l" + lib for lib in libs]
    linkopts += ["-Wl,--pop-state"] + cuda_linkopts + ["-Wl,--allow-shlib-undefined", "-lpthread", "-ldl"]

    rctx.file("BUILD.bazel", _BUILD.format(
        cudnn_linkopts = repr(cudnn_linkopts),
        defines = repr(defines),
        includes = repr(includes),
        linkopts = repr(linkopts),
    ))
    rctx.file("defs.bzl", _DEFS.format(
        cuda = cuda,
        cudnn = len(cudnn_linkopts) > 0,
        lib_dir = lib_dir,
        python = python,
        version = version,
    ))

# local: looked up again at each start of the Bazel server, which takes a second.
libtorch = repository_rule(
    implementation = _libtorch_impl,
    environ = ["TORCH_PYTHON"],
    local = True,
)
