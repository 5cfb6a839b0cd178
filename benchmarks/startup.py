"""Time from process start to the first training step of the Fashion-MNIST example under Python
Lightning; the peer of startup.cc.

The model, data, callbacks and loggers are those of examples/fashion_mnist. benchmarks/run.py gives
the start in STARTED_NS (monotonic clock). Prints `startup_ms N`.
"""

import os
import tempfile
import time

STARTED_NS = int(os.environ.get("STARTED_NS", time.monotonic_ns()))

import gzip  # noqa: E402

import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset, random_split  # noqa: E402
from torchmetrics import Accuracy  # noqa: E402

FOLDER = "/usr/share/datasets/fashion-mnist"
BATCH_SIZE, WIDTH, LR = 128, 16, 5e-3


def read(name, header):
    with gzip.open(f"{FOLDER}/{name}.gz") as file:
        return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8, offset=header)


class FashionMNIST(Dataset):
    def __init__(self):
        self.images = read("train-images-idx3-ubyte", 16).view(-1, 1, 28, 28)
        self.labels = read("train-labels-idx1-ubyte", 8).tolist()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index].float().div_(255).sub_(0.2860).div_(0.3530)
        return {"image": image, "label": self.labels[index]}


class Clothes(pl.LightningDataModule):
    def setup(self, stage):
        self.parts = random_split(FashionMNIST(), [55000, 5000], torch.Generator().manual_seed(0))

    def train_dataloader(self):
        return DataLoader(self.parts[0], batch_size=BATCH_SIZE, shuffle=True, num_workers=1)

    def val_dataloader(self):
        return DataLoader(self.parts[1], batch_size=BATCH_SIZE, num_workers=1)


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        layers, channels = [], 1
        for out in (WIDTH, 2 * WIDTH, 4 * WIDTH):
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(),
                       nn.MaxPool2d(2)]
            channels = out
        self.net = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2),
                                 nn.Linear(channels * 3 * 3, 10))
        self.accuracy = Accuracy("multiclass", num_classes=10)
        self.save_hyperparameters({"lr": LR, "width": WIDTH, "dropout": 0.2})

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch["image"]), batch["label"])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        logits = self.net(batch["image"])
        self.accuracy.update(logits, batch["label"])
        self.log("val_loss", nn.functional.cross_entropy(logits, batch["label"]))
        self.log("val_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self):
        adamw = torch.optim.AdamW(self.parameters(), LR)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            adamw, LR, total_steps=max(self.trainer.estimated_stepping_batches, 10))
        return [adamw], [{"scheduler": schedule, "interval": "step"}]


class FirstStep(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 0:
            print("startup_ms", f"{(time.monotonic_ns() - STARTED_NS) / 1e6:.1f}")


def main():
    pl.seed_everything(42)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(accelerator="cpu", max_steps=1, limit_val_batches=2,
                             default_root_dir=folder, callbacks=[FirstStep()],
                             logger=[CSVLogger(folder), TensorBoardLogger(folder)])
        trainer.fit(Classifier(), datamodule=Clothes())


if __name__ == "__main__":
    main()
