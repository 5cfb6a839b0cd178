"""Runs of Python Lightning and of torch.amp.GradScaler for parity_test.cc, which does the same.

    python parity.py CASES

CASES is the JSON that parity_test.cc has; printed is {"precisions": [...], "scaled": [...],
"scaler": [...]}, an entry for each of its cases.
"""

import json
import logging
import math
import sys
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.set_num_threads(1)

QUIET = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
         "enable_progress_bar": False, "enable_model_summary": False}


def dtype(tensor):
    return str(tensor.dtype)[6:]


def wave(count, phase):
    return torch.sin(torch.arange(count, dtype=torch.float32) * 0.7 + phase)


def fill(module):
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(wave(parameter.numel(), i).mul(0.3).view_as(parameter))


def batches(count):
    return [{"x": wave(64, 0.1 * i).view(8, 8), "y": (torch.arange(8) * 3 + i) % 4} for i in range(count)]


def loader(count):
    return DataLoader(batches(count), batch_size=None)


def make_optimizer(name, parameters):
    if name == "sgd":
        return torch.optim.SGD(parameters, 0.05, momentum=0.9)
    return torch.optim.AdamW(parameters, 1e-2, eps=1e-4, weight_decay=0.1)


def weights(module):
    return [value for p in module.parameters() for value in p.detach().double().flatten()[:4].tolist()]


# ---- Each precision -----------------------------------------------------------------------------


class Probe(pl.LightningModule):
    def __init__(self, optimizer):
        super().__init__()
        self.optimizer_name = optimizer
        self.body = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 32),
                                  nn.BatchNorm1d(32), nn.ReLU())
        self.head = None
        fill(self.body)
        self.seen = {"losses": []}

    def configure_model(self):
        if self.head is not None:
            return
        self.head = nn.Linear(32, 4)
        self.seen["created"] = [dtype(self.head.weight), dtype(torch.ones(1))]
        fill(self.head)

    def step(self, batch, stage):
        output = self.head(self.body(batch["x"]))
        loss = F.cross_entropy(output, batch["y"])
        self.seen[stage] = [dtype(t) for t in (batch["x"], batch["y"], output, torch.ones(1), loss)]
        return loss

    def training_step(self, batch, batch_idx):
        loss = self.step(batch, "train")
        self.seen["losses"].append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.step(batch, "validate")

    def on_train_batch_end(self, *_):
        self.seen["parameters"] = [dtype(p) for p in self.parameters()]
        self.seen["gradients"] = [dtype(p.grad) for p in self.parameters()]
        self.seen["buffers"] = [dtype(b) for b in self.buffers()]
        state = self.optimizers().optimizer.state_dict()["state"]
        self.seen["state"] = sorted({f"{key} {dtype(value)}" for of in state.values()
                                     for key, value in of.items() if key != "step" and value is not None})
        self.seen["weights"] = weights(self)

    def configure_optimizers(self):
        return make_optimizer(self.optimizer_name, self.parameters())


def run_precision(case):
    trainer = pl.Trainer(**QUIET, precision=case["precision"], num_sanity_val_steps=0)
    module = Probe(case["optimizer"])
    trainer.fit(module, loader(50), loader(1))
    return {"name": trainer.precision, **module.seen}


# ---- 16-mixed with a scaler, on the CPU ---------------------------------------------------------


class Scaled(pl.LightningModule):
    def __init__(self, case):
        super().__init__()
        self.case = case
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
        fill(self.net)
        self.automatic_optimization = not case.get("manual", False)
        self.seen = {"losses": [], "scales": [], "trackers": [], "norms": []}

    def training_step(self, batch, batch_idx):
        loss = self.net(batch["x"]).square().mean()
        if batch_idx in self.case["infinite"]:
            loss = loss * math.inf
        self.seen["losses"].append(str(loss.item()) if not math.isfinite(loss.item()) else loss.item())
        if batch_idx in self.case["skipped"]:
            return None
        if not self.automatic_optimization:
            first, second = self.optimizers()
            first.zero_grad()
            second.zero_grad()
            self.manual_backward(loss)
            first.step()
            second.step()
        return loss

    def on_before_optimizer_step(self, optimizer):
        gradients = [p.grad.detach().double().square().sum() for g in optimizer.param_groups
                     for p in g["params"] if p.grad is not None]
        value = torch.stack(gradients).sum().item() if gradients else None
        self.seen["norms"].append("none" if value is None else value if math.isfinite(value) else str(value))

    def on_train_batch_end(self, *_):
        scaler = self.trainer.precision_plugin.scaler
        self.seen["scales"].append(scaler.get_scale())
        self.seen["trackers"].append(scaler._get_growth_tracker())

    def configure_optimizers(self):
        if self.automatic_optimization:
            return make_optimizer(self.case["optimizer"], self.parameters())
        return [make_optimizer(self.case["optimizer"], layer.parameters()) for layer in (self.net[0], self.net[2])]


def run_scaled(case):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=4)
    trainer = pl.Trainer(**QUIET, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], **case["trainer"])
    module = Scaled(case)
    trainer.fit(module, loader(24))
    state = trainer._checkpoint_connector.dump_checkpoint()["MixedPrecision"]
    return {**module.seen, "weights": weights(module), "global_step": trainer.global_step, "state": state}


# ---- The scaler alone ---------------------------------------------------------------------------


def run_scaler(case):
    parameters = [wave(7, 0.0).requires_grad_(), wave(5, 1.0).requires_grad_()]
    optimizer = make_optimizer(case["optimizer"], parameters)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_factor=3.0, backoff_factor=0.25,
                                  growth_interval=3)
    seen = {"scales": [], "trackers": [], "weights": []}
    for i in range(20):
        optimizer.zero_grad()
        loss = sum((p * wave(p.numel(), i)).square().sum() for p in parameters)
        if str(i) in case["factors"]:
            loss = loss * float(case["factors"][str(i)])
        scaler.scale(loss).backward()
        if i % 2:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        seen["scales"].append(scaler.get_scale())
        seen["trackers"].append(scaler._get_growth_tracker())
        seen["weights"].append([v for p in parameters for v in p.tolist()])
        if i == 10:
            state = scaler.state_dict()
            scaler = torch.amp.GradScaler("cpu")
            scaler.load_state_dict(state)
    return {**seen, "state": scaler.state_dict()}


cases = json.loads(sys.argv[1])
print(json.dumps({"precisions": [run_precision(case) for case in cases["precisions"]],
                  "scaled": [run_scaled(case) for case in cases["scaled"]],
                  "scaler": [run_scaler(case) for case in cases["scaler"]]}))
