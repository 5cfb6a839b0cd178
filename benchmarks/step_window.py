"""Times steps of a fit, for the peers of the GPU benchmarks; the peer of step_window.h.

The device is waited for at the ends of a window of steps and nowhere else. A result is one line of
JSON, printed after the word RESULT and appended to the file of --results.
"""

import ctypes
import json
import statistics
import time

import torch

try:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger
except ImportError:
    import pytorch_lightning as pl
    from pytorch_lightning.loggers import CSVLogger

__all__ = ["CSVLogger", "StepWindow", "pl", "report", "report_values"]

PEAK_FLOPS = 989e12  # dense bf16 of an H100 or H200


class Energy:
    """What the first GPU used since the driver was loaded, in joules; None where it does not say."""

    def __init__(self):
        self.nvml = None
        try:
            nvml = ctypes.CDLL("libnvidia-ml.so.1")
            self.device = ctypes.c_void_p()
            if (nvml.nvmlInit_v2() == 0
                    and nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self.device)) == 0):
                self.nvml = nvml
        except (OSError, AttributeError):
            pass

    def joules(self):
        millijoules = ctypes.c_ulonglong()
        if self.nvml is None or self.nvml.nvmlDeviceGetTotalEnergyConsumption(
                self.device, ctypes.byref(millijoules)) != 0:
            return None
        return millijoules.value / 1e3


class StepWindow(pl.Callback):
    """`windows` windows of `steps` steps each, after `warmup` steps."""

    def __init__(self, warmup, steps, windows):
        self.warmup, self.steps, self.windows = warmup, steps, windows
        self.done, self.times, self.energies, self.peak = 0, [], [], 0
        self.energy = Energy()

    @property
    def total(self):
        return self.warmup + self.steps * self.windows

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.count()

    def count(self):
        self.done += 1
        if self.done >= self.warmup and (self.done - self.warmup) % self.steps == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())
            self.energies.append(self.energy.joules())
            self.peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0

    def peak_gigabytes(self):
        """Of tensors, at the end of the windows."""
        return self.peak / 1e9

    def milliseconds(self):
        """Of a step: the median of the windows."""
        return 1e3 * statistics.median(
            (end - start) / self.steps for start, end in zip(self.times, self.times[1:]))

    def joules(self):
        """Of a step, over all windows."""
        if not self.energies or self.energies[0] is None:
            return None
        return (self.energies[-1] - self.energies[0]) / (self.steps * self.windows)


def report(name, window, tokens, flops_per_token, results, **more):
    milliseconds = window.milliseconds()
    per_second = tokens / milliseconds * 1e3
    result = {"name": name, "ms": milliseconds, "tokens_s": per_second,
              "mfu": flops_per_token * per_second / PEAK_FLOPS,
              "peak_gb": window.peak_gigabytes(),
              "joules": window.joules(), **more}
    write(result, results)


def report_values(name, values, results):
    write({"name": name, **values}, results)


def write(result, results):
    line = json.dumps(result)
    print(f"\nRESULT {line}", flush=True)
    if results:
        with open(results, "a") as out:
            out.write(line + "\n")
