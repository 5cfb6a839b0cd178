"""Runs the configurations below with Python Lightning and keeps what they logged.

    python logged_values.py FOLDER

FOLDER/<configuration>/metrics.csv   by CSVLogger
FOLDER/<configuration>/hparams.yaml  by CSVLogger
FOLDER/index.json                    {configuration: {"options", "after": {run: metrics}}}
"""

import json
import logging
import sys
import warnings

import lightning.pytorch as pl
import torch
import torchmetrics
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

CONFIGURATIONS = {
    "plain": {},
    "several_val_loaders": {"val_loaders": 3},
    "accumulation": {
        "trainer": {"accumulate_grad_batches": 2, "log_every_n_steps": 1, "val_check_interval": 0.5}
    },
    "max_steps": {"trainer": {"max_steps": 5, "max_epochs": -1, "val_check_interval": 2}},
    "step_is_logged": {"log_step": True},
    "fast_dev_run": {"trainer": {"fast_dev_run": 2}},
    "manual_optimization": {"manual": True, "monitor": "step"},
    "learning_rate_by_epoch": {"monitor": "epoch", "trainer": {"max_epochs": 3}},
    "learning_rate_by_default": {"monitor": None, "trainer": {"log_every_n_steps": 3}},
}
DEFAULTS = {"trainer": {}, "val_loaders": 2, "log_step": False, "manual": False, "monitor": "step"}


class FromCallback(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        module.log("callback/batch", float(batch_idx), on_epoch=True)

    def on_validation_epoch_end(self, trainer, module):
        module.log("callback/validated", 7.0)


class Module(pl.LightningModule):
    def __init__(self, width=4, lr=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, 1)
        with torch.no_grad():
            self.layer.weight.fill_(0.01)
            self.layer.bias.fill_(0.0)
        self.updated = torchmetrics.MeanMetric()
        self.forwarded = torchmetrics.MeanMetric()

    def configure(self, options):
        self.options = options
        self.automatic_optimization = not options["manual"]

    def training_step(self, batch, batch_idx):
        (x,) = batch
        value = x.mean()
        self.log("a", value)
        self.log("b", 2 * value, on_step=True, on_epoch=True, prog_bar=True)
        self.log("plain_epoch", value, on_step=False, on_epoch=True)
        for reduce in ("sum", "min", "max", "mean"):
            self.log(f"by_{reduce}", value, on_step=False, on_epoch=True, reduce_fx=reduce)
        self.log_dict({"dict/one": value, "dict/count": batch_idx}, on_epoch=True)
        self.log("weighted", value, on_step=False, on_epoch=True, batch_size=batch_idx + 1)
        self.log("not_in_the_logger", value, logger=False)
        self.updated.update(x)
        self.log("updated", self.updated, on_step=True, on_epoch=True)
        self.forwarded(x)
        self.log("forwarded", self.forwarded, on_step=True, on_epoch=True)
        loss = self.layer(x).square().mean()
        self.log("loss", loss)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def on_train_epoch_start(self):
        self.log("at_epoch_start", float(self.current_epoch))

    def on_train_epoch_end(self):
        self.log("at_epoch_end", 10.0 * self.current_epoch)

    def on_before_optimizer_step(self, optimizer):
        self.log("before_step", float(self.global_step))

    def evaluate(self, prefix, batch, batch_idx, dataloader_idx):
        value = batch[0].mean()
        self.log(f"{prefix}/v", value)
        self.log(f"{prefix}/w", value, on_step=True, on_epoch=True, prog_bar=True)
        self.log(f"{prefix}/max", value, reduce_fx="max")
        self.log(f"{prefix}/named_{dataloader_idx}", value, add_dataloader_idx=False)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.evaluate("val", batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self):
        self.log("val/at_end", 1.5)
        if self.options["log_step"]:
            self.log("step", 100.0 * (self.current_epoch + 1))

    def test_step(self, batch, batch_idx):
        self.evaluate("test", batch, batch_idx, 0)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.5,
                                    weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def loader(first, rows):
    x = (torch.arange(rows * 4, dtype=torch.float32).view(rows, 4) + first) / 7
    return DataLoader(TensorDataset(x), batch_size=2)


def numbers(metrics):
    return {name: float(value) for name, value in metrics.items()}


def run(name, options, folder):
    callbacks = [FromCallback()]
    if not options["trainer"].get("fast_dev_run"):
        callbacks.append(LearningRateMonitor(options["monitor"], log_momentum=True,
                                             log_weight_decay=True))
    flags = {"max_epochs": 2, "log_every_n_steps": 2, **options["trainer"]}
    trainer = pl.Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=folder, callbacks=callbacks,
        logger=CSVLogger(folder, name="", version=name), **flags)
    module = Module()
    module.configure(options)
    val = [loader(100 * i, 3 + i) for i in range(options["val_loaders"])]
    after = {}

    def note(run, results):
        after[run] = {
            "callback_metrics": numbers(trainer.callback_metrics),
            "logged_metrics": numbers(trainer.logged_metrics),
            "progress_bar_metrics": numbers(trainer.progress_bar_metrics),
            "results": results,
        }

    trainer.fit(module, loader(0, 9), val)
    note("fit", [])
    note("validate", trainer.validate(module, val, verbose=False))
    note("test", trainer.test(module, loader(50, 5), verbose=False))
    return after


def main():
    folder = sys.argv[1]
    torch.set_num_threads(1)
    index = {}
    for name, changes in CONFIGURATIONS.items():
        options = {**DEFAULTS, **changes}
        index[name] = {"options": options, "after": run(name, options, folder)}
    with open(f"{folder}/index.json", "w") as file:
        json.dump(index, file, indent=1)


if __name__ == "__main__":
    main()
