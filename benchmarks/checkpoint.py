"""The peer of checkpoint.cc: Python Lightning's way of saving, or torch.save where the second word
says so, and torch.load.

    checkpoint.py save|memory|stall|load|open|small [lightning|torch]
"""

import os
import sys
import time

import torch

ROUNDS = 3


def seconds(work):
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def best(work):
    return min(seconds(work) for _ in range(ROUNDS))


def state(tensors, numbers):
    return {"state_dict": {f"layer.{i}": torch.randn(numbers) for i in range(tensors)}}


def one_gib():
    return state(64, 4 << 20)


def to_disk(path):
    for name in (path, "."):
        fd = os.open(name, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def saver(way):
    if way == "torch":
        return torch.save
    from lightning.fabric.utilities.cloud_io import _atomic_save
    return _atomic_save


def save(way):
    checkpoint, write = one_gib(), saver(way)

    def work():
        write(checkpoint, "one.ckpt")
        to_disk("one.ckpt")

    print(f"save_s {best(work):.3f}")


def memory_mib(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) / 1024


def memory(way):
    checkpoint, write = one_gib(), saver(way)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = memory_mib("VmRSS")
    write(checkpoint, "one.ckpt")
    print(f"extra_mib {memory_mib('VmHWM') - before:.0f}")


def stall(way):
    from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

    checkpoint, stalls = one_gib(), []
    for _ in range(ROUNDS + 1):
        io = AsyncCheckpointIO(TorchCheckpointIO())
        stalls.append(seconds(lambda: io.save_checkpoint(checkpoint, "one.ckpt")))
        io.teardown()
    print(f"stall_ms {min(stalls[1:]) * 1e3:.1f}")


def load(way):
    torch.save(one_gib(), "one.ckpt")
    print(f"load_s {best(lambda: torch.load('one.ckpt', weights_only=True)):.4f}")


def open_lazily(way):
    torch.save(one_gib(), "one.ckpt")
    work = lambda: torch.load("one.ckpt", weights_only=True, mmap=True)
    print(f"open_ms {best(work) * 1e3:.2f}")


def small(way):
    torch.save(state(50_000, 8), "small.ckpt")
    work = lambda: torch.load("small.ckpt", weights_only=True)
    print(f"small_ms {best(work) * 1e3:.1f}")


if __name__ == "__main__":
    modes = {"save": save, "memory": memory, "stall": stall, "load": load, "open": open_lazily,
             "small": small}
    modes[sys.argv[1]](sys.argv[2] if len(sys.argv) > 2 else "lightning")
