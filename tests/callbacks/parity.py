"""Runs fit with one callback under Python Lightning, as the C++ test beside it does.

Usage: parity.py CONFIGURATIONS FOLDER, where CONFIGURATIONS is a JSON list; prints one line of JSON
for each. Written for lightning 2.6.6 and torch 2.11.0.
"""

import json
import logging
import os
import sys
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class BoringModule(LightningModule):
    def __init__(self, configuration):
        super().__init__()
        self.layer = torch.nn.Linear(32, 2)
        self.automatic_optimization = not configuration.get("manual", False)
        self.val_losses = [float(x) for x in configuration.get("val_losses", [])]
        self.fail_at_step = configuration.get("fail_at_step", -1)
        self.validations = 0

    def loss(self, batch):
        output = self.layer(batch)
        return torch.nn.functional.mse_loss(output, torch.ones_like(output))

    def training_step(self, batch, batch_idx):
        if self.global_step == self.fail_at_step:
            raise RuntimeError("asked to fail")
        self.log("step_number", float(self.global_step))
        loss = self.loss(batch)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch, batch_idx):
        self.loss(batch)

    def on_validation_epoch_end(self):
        if not self.val_losses or self.trainer.sanity_checking:
            return
        index = min(self.validations, len(self.val_losses) - 1)
        self.log("val_loss", self.val_losses[index])
        self.log("val/acc", 0.1 * index)
        self.validations += 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(rows):
    return torch.utils.data.DataLoader(torch.randn(rows, 32), batch_size=2)


def number(value):
    return None if value is None else repr(float(value))


def listing(folder):
    lines = []
    for root, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            path = os.path.join(root, name)
            shown = os.path.relpath(path, folder)
            lines.append(shown + " -> " + os.readlink(path) if os.path.islink(path) else shown)
    return sorted(lines)


def describe(callback, folder):
    if isinstance(callback, EarlyStopping):
        return {
            "wait_count": callback.wait_count,
            "stopped_epoch": callback.stopped_epoch,
            "best_score": number(callback.best_score),
            "reason": callback.stopping_reason.value,
            "message": callback.stopping_reason_message or "",
        }

    def short(path):
        return os.path.relpath(path, folder) if path else ""

    return {
        "files": listing(folder),
        "best_model_path": short(callback.best_model_path),
        "best_model_score": number(callback.best_model_score),
        "current_score": number(callback.current_score),
        "best_k_models": [[short(p), number(v)] for p, v in callback.best_k_models.items()],
        "kth_best_model_path": short(callback.kth_best_model_path),
        "kth_value": number(callback.kth_value),
        "last_model_path": short(callback.last_model_path),
    }


def run(configuration, folder):
    folder = os.path.realpath(folder)
    kind = {"ModelCheckpoint": ModelCheckpoint, "EarlyStopping": EarlyStopping}[configuration["callback"]]
    options = dict(configuration["options"])
    if kind is ModelCheckpoint:
        options["dirpath"] = folder
    for name in ("stopping_threshold", "divergence_threshold"):
        if name in options:
            options[name] = float(options[name])
    callback = kind(**options)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=kind is ModelCheckpoint,
        default_root_dir=folder,
        **configuration["trainer"],
    )
    error = ""
    try:
        trainer.fit(
            BoringModule(configuration), loader(8), loader(4) if configuration.get("validates", True) else None
        )
    except Exception as e:
        error = type(e).__name__
    return {
        "name": configuration["name"],
        "error": bool(error),
        "state_key": callback.state_key,
        "epoch": trainer.current_epoch,
        "step": trainer.global_step,
        **describe(callback, folder),
    }


for i, configuration in enumerate(json.loads(open(sys.argv[1]).read())):
    print(json.dumps(run(configuration, os.path.join(sys.argv[2], str(i)))))
