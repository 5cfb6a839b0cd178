"""Runs the GPU benchmarks, each next to its Python peer, and prints one table of them all.

    benchmarks/gpu.py [--programs FOLDER] [--tiny]
                      [--only gpt2,small,overhead,curves,llama,ddp,fsdp,fsdp-async]

FOLDER holds the programs gpt2, llama and fsdp, by default where Bazel leaves them; the peers run
under the Python that runs this, whose LibTorch the programs use too. ddp and fsdp need two GPUs. A
program that fails or that takes too long is reported, and the rest goes on. --tiny runs everything
in small on the CPU: the numbers mean nothing, but it shows that all of it works. Checkpoints are
saved to the disk of --disk.
"""

import argparse
import glob
import importlib.util
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)

SIZES = {
    "gpt2": "--warmup 20 --steps 30 --windows 3",
    "small": "--layers 4 --width 128 --heads 4 --vocabulary 256 --context 64 --batch 8 "
             "--warmup 50 --steps 200 --windows 5",
    "curves": "--layers 6 --width 384 --heads 6 --vocabulary 512 --context 256 --batch 16 "
              "--steps 200",
    "llama": "--layers 16 --width 2048 --heads 32 --kv_heads 8 --hidden 8192 --vocabulary 128256 "
             "--context 2048 --batch 8 --warmup 8 --steps 10 --windows 2",
    "fsdp": "--layers 24 --width 2048 --heads 16 --vocabulary 50304 --context 2048 --batch 8 "
            "--devices 2 --warmup 5 --steps 8 --windows 2",
}
TINY = {
    "curves": "--layers 2 --width 64 --heads 4 --vocabulary 64 --context 32 --batch 4 --steps 20",
    "llama": "--layers 2 --width 64 --heads 4 --kv_heads 2 --hidden 128 --vocabulary 256 "
             "--context 32 --batch 4 --warmup 2 --steps 3 --windows 2",
    "fsdp": "--layers 3 --width 64 --heads 4 --vocabulary 256 --context 32 --batch 4 --devices 2 "
            "--warmup 2 --steps 3 --windows 2",
}
TINY["gpt2"] = TINY["small"] = ("--layers 2 --width 64 --heads 4 --vocabulary 256 --context 32 "
                                "--batch 4 --warmup 2 --steps 3 --windows 2")


class Run:
    """A program or, if its name ends in .py, a peer. It gives a result for each of `variants`, and
    one more for the checkpoint that it saves to the disk if it `saves`."""

    def __init__(self, part, program, variants, sizes=None, limit_s=60, more="", saves=False):
        self.part, self.program, self.variants = part, program, variants
        self.sizes, self.limit_s, self.more, self.saves = sizes or part, limit_s, more, saves

    @property
    def is_peer(self):
        return self.program.endswith(".py")

    @property
    def results(self):
        return len(set(self.variants)) + (1 if self.saves else 0)

    def commands(self, programs, results, folder, disk, tiny):
        """What each does, and the command."""
        common = (TINY if tiny else SIZES)[self.sizes].split() + self.more.split()
        common += ["--name", self.part, "--results", results, "--folder", folder]
        if self.saves:
            common += ["--checkpoint", disk]
        if tiny:
            common += ["--accelerator", "cpu"]
        variants = [v for v in self.variants
                    if not (tiny and v in ("graph", "compile", "reduce-overhead"))]
        if not self.is_peer:
            program = os.path.join(programs, self.program)
            return [(f"{self.part} {variant}", [program, "--variant", variant, *common,
                                                *(["--devices", "2"] if variant == "ddp" else [])])
                    for variant in variants]
        if not variants:
            return []
        script = os.path.join(HERE, self.program)
        return [(f"{self.part} {', '.join(variants)}",
                 [sys.executable, script, "--variants", ",".join(variants), *common])]


# In the order of their worth, for a time that runs out.
RUNS = [
    Run("gpt2", "gpt2", ["nn", "graph", "nn16", "plain"], limit_s=70),
    Run("gpt2", "gpt2.py", ["eager", "compile"], limit_s=150),
    Run("small", "gpt2", ["graph", "nn"], limit_s=40),
    Run("small", "gpt2.py", ["eager", "reduce-overhead", "compile"], limit_s=120),
    Run("curves", "gpt2", ["curves"]),
    # Twice, for what the smallest differ by is small.
    Run("overhead", "gpt2", ["trainer", "bare"] * 2, sizes="small", limit_s=40),
    Run("overhead", "gpt2.py", ["trainer", "bare"] * 2, sizes="small", limit_s=90),
    Run("llama", "llama", ["nn"], limit_s=80),
    Run("llama", "llama.py", ["compile"], limit_s=150),
    # A peer of its own for each, as its peak of memory is the process's.
    Run("fsdp", "fsdp", ["nn-true"], limit_s=100, more="--overlap 3 --recompute 6", saves=True),
    Run("fsdp", "fsdp.py", ["true"], limit_s=120, saves=True),
    Run("fsdp-async", "fsdp", ["nn-true"], sizes="fsdp", more="--async 1", saves=True),
    Run("fsdp", "fsdp", ["nn-mixed", "nn-checkpointing"], more="--overlap 3"),
    Run("fsdp", "fsdp.py", ["mixed"], limit_s=80),
    Run("fsdp", "fsdp.py", ["checkpointing"], limit_s=80),
    Run("fsdp", "fsdp", ["plain-true", "plain-mixed", "plain-checkpointing"], more="--overlap 3"),
    Run("ddp", "gpt2", ["nn", "ddp"], sizes="gpt2"),
]
NEEDS_TWO = {"ddp", "fsdp", "fsdp-async"}  # GPUs


def quotient(over, under, key="ms"):
    return lambda r: r[over][key] / r[under][key]


def overhead(r):
    ours = r["ours:overhead_trainer"]["ms"] - r["ours:overhead_bare"]["ms"]
    peer = r["peer:overhead_trainer"]["ms"] - r["peer:overhead_bare"]["ms"]
    # An overhead below what can be measured counts as a microsecond.
    return peer / max(ours, 1e-3)


def fsdp_goals():
    for case, name in (("true", "bf16-true"), ("mixed", "bf16-mixed"),
                       ("checkpointing", "checkpointing")):
        peer, fast, plain = f"peer:fsdp_{case}", f"ours:fsdp_nn-{case}", f"ours:fsdp_plain-{case}"
        yield (f"GPT 1.3 B, FSDP, {name}: times Lightning", quotient(peer, fast), 1.15, 1.3)
        yield (f"< GPT 1.3 B, FSDP, {name}: peak as a part of it",
               quotient(fast, peer, "highest_peak_gb"), 0.9, 0.75)
        yield (f"GPT 1.3 B, FSDP, {name}: collectives hidden",
               lambda r, fast=fast: r[fast]["hidden"], 0.8, 0.9)
        yield (f"GPT 1.3 B, FSDP, {name}, torch::nn: times Lightning", quotient(peer, plain),
               1.0, 1.05)
        yield (f"< GPT 1.3 B, FSDP, {name}: last loss beside it",
               lambda r, fast=fast, peer=peer: abs(
                   r[fast]["last_loss"] / r[peer]["last_loss"] - 1), 0.05, 0.02)


# What it is, how it comes of the results, the least it should be and what is aimed at; for those
# with a "<" the most.
GOALS = [
    ("GPT-2 124M, lightning/nn: times torch.compile", quotient("peer:gpt2_compile", "ours:gpt2_nn"),
     1.13, 1.25),
    ("GPT-2 124M, lightning/nn: times eager", quotient("peer:gpt2_eager", "ours:gpt2_nn"),
     1.5, 1.7),
    ("GPT-2 124M, cuda_graph: times eager", quotient("peer:gpt2_eager", "ours:gpt2_graph"),
     1.5, 1.7),
    ("GPT-2 124M, 16-bit residual: times torch.compile",
     quotient("peer:gpt2_compile", "ours:gpt2_nn16"), 1.13, 1.25),
    ("GPT-2 124M, 16-bit residual: times eager", quotient("peer:gpt2_eager", "ours:gpt2_nn16"),
     1.5, 1.7),
    ("GPT-2 124M, torch::nn: times eager", quotient("peer:gpt2_eager", "ours:gpt2_plain"),
     0.9, 1.0),
    ("< GPT-2 124M: peak GB of tensors", lambda r: r["ours:gpt2_nn"]["peak_gb"], 16.7, 15.0),
    ("< GPT-2 124M: peak as a part of torch.compile's",
     quotient("ours:gpt2_nn", "peer:gpt2_compile", "peak_gb"), 1.0, 0.9),
    ("small GPT, cuda_graph: times reduce-overhead",
     quotient("peer:small_reduce-overhead", "ours:small_graph"), 4.0, 6.0),
    ("small GPT, cuda_graph: times eager", quotient("peer:small_eager", "ours:small_graph"),
     10.0, 15.0),
    ("Trainer's overhead: Lightning's over ours", overhead, 20.0, 50.0),
    ("Llama-like 1.2 B: times torch.compile", quotient("peer:llama_compile", "ours:llama_nn"),
     1.05, 1.15),
    ("GPT-2 124M, DDP on two GPUs: part of twice one's", quotient("ours:ddp_nn", "ours:ddp_ddp"),
     0.97, 0.99),
    *fsdp_goals(),
    ("GPT 1.3 B, sharded save: times as fast as Lightning's",
     quotient("peer:fsdp_save", "ours:fsdp_save", "save_s"), 3.0, 5.0),
    ("GPT 1.3 B, sharded load: times as fast as Lightning's",
     quotient("peer:fsdp_save", "ours:fsdp_save", "load_s"), 3.0, 5.0),
    ("< GPT 1.3 B, asynchronous sharded save: seconds that training waits",
     lambda r: r["ours:fsdp-async_save"]["stall_s"], 1.0, 0.5),
    ("< loss curve: most that 200 steps differ from autocast's",
     lambda r: r["ours:curves_curves"]["max_difference"], 0.01, 0.007),
    ("< loss curve, 16-bit residual",
     lambda r: r["ours:curves_curves"]["max_difference_16"], 0.01, 0.007),
]


def gpus():
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return 0
    return len(listed.stdout.splitlines())


def environment(tiny):
    """The programs find the LibTorch of this Python."""
    torch = importlib.util.find_spec("torch").submodule_search_locations[0]
    folders = [os.path.join(torch, "lib"),
               *sorted(glob.glob(os.path.join(os.path.dirname(torch), "nvidia", "*", "lib"))),
               *os.environ.get("LD_LIBRARY_PATH", "").split(":")]
    path = ":".join(folder for folder in folders if folder)
    return {**os.environ, "LD_LIBRARY_PATH": path,
            "TERM": "xterm-256color", "COLUMNS": "120", "PYTHONWARNINGS": "ignore",
            "PYTHONUNBUFFERED": "1", **({"OMP_NUM_THREADS": "1"} if tiny else {})}


def run(command, folder, limit_s, variables):
    """What a program prints on a terminal of its own, and what is wrong with how it ended."""
    ours, theirs = pty.openpty()
    end = time.monotonic() + limit_s
    try:
        process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder,
                                   env=variables, start_new_session=True)
    except OSError as error:
        os.close(ours)
        return "", str(error)
    finally:
        os.close(theirs)
    output, late = b"", False
    while True:
        left = end - time.monotonic()
        if left <= 0 or not select.select([ours], [], [], left)[0]:
            late = True
            os.killpg(process.pid, signal.SIGKILL)
            break
        try:
            read = os.read(ours, 1 << 16)
        except OSError:  # the program closed its side
            break
        if not read:
            break
        output += read
    os.close(ours)
    status = process.wait()
    text = output.decode(errors="replace")
    if late:
        return text, f"took longer than {limit_s:.0f} s"
    return text, f"ended with {status}" if status != 0 else None


def last_lines(text, count=25):
    lines = [line.split("\r")[-1] for line in text.replace("\r\n", "\n").split("\n")]
    return "\n".join("    " + line for line in [line for line in lines if line.strip()][-count:])


def measure(only, programs, tiny, budget_s, disk):
    """Results by name: "ours:gpt2_nn", "peer:gpt2_eager"."""
    found, variables = {}, environment(tiny)
    end = time.monotonic() + budget_s
    shared_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    for each in RUNS:
        if only and each.part not in only:
            continue
        side = "peer" if each.is_peer else "ours"
        folder = tempfile.mkdtemp(dir=shared_memory)
        on_disk = tempfile.mkdtemp(dir=disk)
        results = os.path.join(folder, "results.jsonl")
        for what, command in each.commands(programs, results, folder, on_disk, tiny):
            left = end - time.monotonic()
            if left < 5:
                print(f"{side}: {what}: no time left", flush=True)
                continue
            begin = time.monotonic()
            text, wrong = run(command, folder, min(each.limit_s, left), variables)
            taken = time.monotonic() - begin
            if wrong:
                print(f"{side}: {what} {wrong} ({taken:.0f} s):\n{last_lines(text)}", flush=True)
            else:
                print(f"{side}: {what}: {taken:.0f} s", flush=True)
        if os.path.exists(results):
            with open(results) as lines:
                for line in lines:
                    result = json.loads(line)
                    name = f"{side}:{result['name']}"
                    # Of one that was measured twice the faster counts.
                    if name not in found or result.get("ms", 0) < found[name].get("ms", 0):
                        found[name] = result
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(on_disk, ignore_errors=True)
    return found


def cell(result, key, form):
    value = result.get(key)
    return "-" if value is None else format(value, form)


def show(found):
    print(f"\n{'':34}{'ms':>9}{'tokens/s':>12}{'MFU':>7}{'peak GB':>9}{'J/step':>8}"
          f"{'loss':>8}{'hidden':>8}")
    for name, result in found.items():
        if "ms" in result:
            print(f"{name:34}{cell(result, 'ms', '9.3f'):>9}"
                  f"{cell(result, 'tokens_s', ',.0f'):>12}{cell(result, 'mfu', '.3f'):>7}"
                  f"{cell(result, 'peak_gb', '.2f'):>9}{cell(result, 'joules', '.2f'):>8}"
                  f"{cell(result, 'last_loss', '.3f'):>8}{cell(result, 'hidden', '.3f'):>8}")
        else:
            print(name, " ".join(f"{k}={v:.5g}" for k, v in result.items() if k != "name"))
    print(f"\n{'':58}{'measured':>9}{'at least':>9}{'aim':>7}")
    for name, value, least, aim in GOALS:
        try:
            measured = value(found)
        except (KeyError, ZeroDivisionError):
            continue
        is_less_better = name.startswith("< ")
        good = measured <= least if is_less_better else measured >= least
        reached = measured <= aim if is_less_better else measured >= aim
        print(f"{name.removeprefix('< '):58}{measured:>9.4g}{least:>9.4g}{aim:>7.4g}  "
              f"{'aim reached' if reached else 'good' if good else 'MISSED'}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--programs", default=os.path.join(ROOT, "bazel-bin", "benchmarks"))
    parser.add_argument("--only", default="")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--budget", type=float, default=350.0, metavar="SECONDS")
    parser.add_argument("--json", help="a file for the results")
    parser.add_argument("--disk", metavar="FOLDER", help="by default that for temporary files")
    arguments = parser.parse_args()
    only = [part for part in arguments.only.split(",") if part]
    unknown = set(only) - {each.part for each in RUNS}
    if unknown:
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}; there are: "
                 f"{', '.join(dict.fromkeys(each.part for each in RUNS))}")
    if not only:
        only = [each.part for each in RUNS
                if arguments.tiny or gpus() > 1 or each.part not in NEEDS_TWO]
    found = measure(only, os.path.abspath(arguments.programs), arguments.tiny, arguments.budget,
                    arguments.disk)
    show(found)
    if arguments.json:
        with open(arguments.json, "w") as out:
            json.dump(found, out, indent=1)
    # A program without a result has failed.
    wanted = sum(each.results for each in RUNS if not only or each.part in only)
    sys.exit(1 if len(found) < wanted and not arguments.tiny else 0)


if __name__ == "__main__":
    main()
