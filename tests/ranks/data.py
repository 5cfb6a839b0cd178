"""What two ranks of the original see of their data and log of it: "ranks" of data.json.

  data.py FOLDER    starts both ranks; each writes FOLDER/python<rank>.json
"""
import json
import os
import sys
import warnings

warnings.filterwarnings("ignore")
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, WeightedRandomSampler
import lightning.pytorch as pl
import logging

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Numbers(Dataset):
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return torch.tensor([float(index)])


class Backwards(Sampler):
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __iter__(self):
        return iter(range(self.size - 1, -1, -1))


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = {}
        self.logged = []

    def see(self, stage, batch):
        self.seen.setdefault(stage, []).append([int(x) for x in batch.flatten()])

    def training_step(self, batch, batch_idx):
        self.see(f"train {self.current_epoch}", batch)
        value = batch.mean()
        self.log("mean", value, sync_dist=True, on_step=True, on_epoch=True)
        self.log("largest", batch.max(), sync_dist=True, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("sum", value, sync_dist=True, on_step=False, on_epoch=True, reduce_fx="sum")
        return self.layer(batch).mean() * 0

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.logged.append(float(self.trainer.callback_metrics["mean_step"]))

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.see("validate", batch)
        self.log("val", batch.mean(), sync_dist=True)
        self.log("own", batch.mean())

    def test_step(self, batch, batch_idx):
        self.see("test", batch)
        self.log("test", batch.mean(), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        self.see("predict", batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(folder, **flags):
    return pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, max_epochs=2,
                      default_root_dir=folder, **flags)


def main(folder):
    pl.seed_everything(5)
    found = {}
    net = Net()
    fit = trainer(folder)
    fit.fit(net, DataLoader(Numbers(11), 2), DataLoader(Numbers(7), 2))
    found["metrics"] = {name: float(value) for name, value in sorted(fit.callback_metrics.items())}
    fit.test(net, DataLoader(Numbers(5), 2, shuffle=True), verbose=False)
    found["tested"] = {name: float(value) for name, value in sorted(fit.callback_metrics.items())}
    fit.predict(net, DataLoader(Numbers(7), 2))
    found["seen"], found["logged"] = net.seen, net.logged

    other = Net()
    trainer(folder, limit_val_batches=0).fit(other, DataLoader(Numbers(9), 2, sampler=Backwards(9)))
    found["backwards"] = other.seen
    other = Net()
    fit = trainer(folder, overfit_batches=2)
    fit.fit(other, DataLoader(Numbers(9), 2, shuffle=True, drop_last=True))
    found["overfits"] = other.seen
    other = Net()
    trainer(folder, use_distributed_sampler=False).fit(other, DataLoader(Numbers(5), 2))
    found["not shared"] = other.seen
    with open(f"{folder}/python{fit.global_rank}.json", "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1])
