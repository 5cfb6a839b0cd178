"""What Python Lightning's Trainer costs per step over a bare loop; the peer of trainer_overhead.cc.

A small MLP on one CPU thread, with all default callbacks, a CSV logger and train_loss on the
progress bar at each step. Wants a terminal for its output and a folder for what it writes
(--folder); benchmarks/run.py gives it both.
Prints `overhead_us N`.
"""

import argparse
import statistics
import time

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader


class MLP(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
        self.times = []

    def loss(self, batch):
        return nn.functional.cross_entropy(self.net(batch["x"]), batch["y"])

    def training_step(self, batch, batch_idx):
        self.times.append(time.perf_counter())
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def batches(count):
    return DataLoader([{"x": torch.randn(32, 32), "y": torch.randint(0, 10, (32,))}
                       for _ in range(count)], batch_size=None)


def microseconds(times, steps):
    """Of a step, without the first epoch, which warms up."""
    return (times[-1] - times[steps]) / (len(times) - 1 - steps) * 1e6


def bare(loader, steps, epochs):
    module = MLP()
    optimizer = module.configure_optimizers()
    for _ in range(epochs):
        for batch in loader:
            module.times.append(time.perf_counter())
            loss = module.loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return microseconds(module.times, steps)


def trained(loader, steps, epochs, folder):
    module = MLP()
    trainer = pl.Trainer(accelerator="cpu", max_epochs=epochs, default_root_dir=folder,
                         logger=CSVLogger(folder))
    trainer.fit(module, loader)
    return microseconds(module.times, steps)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", default="/tmp/trainer_overhead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loader = batches(arguments.steps)
    pairs = [(bare(loader, arguments.steps, arguments.epochs),
              trained(loader, arguments.steps, arguments.epochs, arguments.folder))
             for _ in range(arguments.repeats)]
    print("bare_us", f"{statistics.median(b for b, _ in pairs):.2f}")
    print("trainer_us", f"{statistics.median(t for _, t in pairs):.2f}")
    print("overhead_us", f"{statistics.median(t - b for b, t in pairs):.2f}")


if __name__ == "__main__":
    main()
