"""Runs the benchmarks that this machine can run, each next to its Python peer.

    benchmarks/run.py [NAME ...]

Prints a line for each, `NAME ours=X peer=Y ratio=Z`; a larger ratio is better for us. A benchmark
is a program of this folder and a Python script of the same name, which print `quantity number`; the
two take turns. The programs are built by `make bench`.
"""

import fcntl
import os
import pty
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
PROGRAMS = os.environ.get("LIGHTNING_BENCHMARKS", os.path.join(ROOT, "bazel-bin", "benchmarks"))
PYTHON = os.environ.get("LIGHTNING_PYTHON", os.path.join(ROOT, ".venv", "bin", "python"))


class Benchmark:
    """`quantity` is what both sides print; less of it is better, or more.

    `arguments` go to both programs, `ours` only to ours; "$DIR" in them is the folder in which each
    run begins, empty and gone afterwards.
    """

    def __init__(self, name, quantity, less_is_better, program=None, arguments=(), ours=(), runs=3):
        self.name, self.quantity, self.less_is_better = name, quantity, less_is_better
        self.program, self.runs = program or name, runs
        self.arguments, self.ours = list(arguments), list(ours)

    def measure(self):
        ours = [os.path.join(PROGRAMS, self.program), *self.arguments, *self.ours]
        peer = [PYTHON, os.path.join(HERE, self.program + ".py"), *self.arguments]
        values = {"ours": [], "peer": []}
        # The first round brings files into the page cache.
        for i in range(self.runs + 1):
            for side, command in (("ours", ours), ("peer", peer)):
                value = self.value(on_terminal(command))
                if i > 0:
                    values[side].append(value)
        return statistics.median(values["ours"]), statistics.median(values["peer"])

    def value(self, output):
        found = re.findall(rf"\b{self.quantity} (-?[0-9.]+)", output)
        if not found:
            raise RuntimeError(f"{self.name} printed no {self.quantity}:\n{output[-2000:]}")
        return float(found[-1])


BENCHMARKS = [
    Benchmark("trainer_overhead", "overhead_us", less_is_better=True,
              arguments=["--folder", "$DIR"]),
    Benchmark("startup", "startup_ms", less_is_better=True, runs=5, ours=[
        "fit", "--config", os.path.join(ROOT, "examples/fashion_mnist/config.yaml"),
        "--trainer.callbacks", "[{class_path: FirstStep}]", "--trainer.accelerator", "cpu",
        "--trainer.max_steps", "1", "--trainer.limit_val_batches", "2",
        "--trainer.default_root_dir", "$DIR"]),
    Benchmark("data_loader", "samples_per_s", less_is_better=False, arguments=["2", "64"]),
    Benchmark("save", "save_s", less_is_better=True, program="checkpoint", arguments=["save"]),
    Benchmark("save_torch", "save_s", less_is_better=True, program="checkpoint",
              arguments=["save", "torch"]),
    Benchmark("save_memory", "extra_mib", less_is_better=True, program="checkpoint",
              arguments=["memory"]),
    Benchmark("save_stall", "stall_ms", less_is_better=True, program="checkpoint",
              arguments=["stall"]),
    Benchmark("load", "load_s", less_is_better=True, program="checkpoint", arguments=["load"]),
    Benchmark("load_lazily", "open_ms", less_is_better=True, program="checkpoint",
              arguments=["open"]),
    Benchmark("load_50000", "small_ms", less_is_better=True, program="checkpoint",
              arguments=["small"]),
]


def on_terminal(command):
    """What a program prints on a terminal of its own."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    folder = tempfile.TemporaryDirectory()
    command = [part.replace("$DIR", folder.name) for part in command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color",
                   "PYTHONWARNINGS": "ignore", "STARTED_NS": str(time.monotonic_ns())}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs,
                               env=environment, cwd=folder.name, start_new_session=True)
    os.close(theirs)
    output = b""
    while True:
        try:
            read = os.read(ours, 1 << 16)
        except OSError:  # the program closed its side
            break
        if not read:
            break
        output += read
    os.close(ours)
    folder.cleanup()
    text = output.decode(errors="replace")
    if process.wait() != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{text[-2000:]}")
    return text


def main():
    wanted = sys.argv[1:]
    unknown = set(wanted) - {benchmark.name for benchmark in BENCHMARKS}
    if unknown:
        names = ", ".join(benchmark.name for benchmark in BENCHMARKS)
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}; there are: {names}")
    failed = False
    for benchmark in BENCHMARKS:
        if wanted and benchmark.name not in wanted:
            continue
        try:
            ours, peer = benchmark.measure()
        except (OSError, RuntimeError) as error:
            print(f"{benchmark.name} failed: {error}", file=sys.stderr)
            failed = True
            continue
        better, worse = (peer, ours) if benchmark.less_is_better else (ours, peer)
        # An overhead below what can be measured counts as a hundredth of its unit.
        ratio = better / max(worse, 0.01)
        print(f"{benchmark.name} ours={ours:g} peer={peer:g} ratio={ratio:.2f}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
