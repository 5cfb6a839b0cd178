"""Trains small models with Python Lightning and writes what loss_curves_test.cc needs to do the same.

    python loss_curves.py FOLDER

FOLDER/data.bin    initial weights and batches, raw little-endian float32 and int64
FOLDER/index.json  {"tensors": {name: {dtype, shape, offset}}, "batches": count,
                    "runs": [{name, model, optimizer, trainer flags, schedule, losses}]}
"""

import json
import logging
import os
import sys
import tempfile
import warnings

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

STEPS = 100
BATCHES = 200  # enough for 100 steps that accumulate two
BATCH_SIZE, TOKENS, VOCABULARY, WIDTH, HEADS, LAYERS = 8, 12, 50, 32, 4, 2


# Shapes: B batch, T tokens, D width, H heads, V vocabulary.
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        # Without bias: the gradient of a key's bias is zero but for rounding, which Adam would blow
        # up to whole steps.
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x_BTD):
        size, tokens, width = x_BTD.shape
        qkv = self.qkv(self.norm1(x_BTD)).view(size, tokens, 3, HEADS, width // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.proj(attended.transpose(1, 2).reshape(size, tokens, width))
        return x_BTD + self.down(F.gelu(self.up(self.norm2(x_BTD))))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(TOKENS, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens_BT):
        x_BTD = self.embedding(tokens_BT) + self.position
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(self.norm(x_BTD))

    def loss(self, x, y):
        return F.cross_entropy(self(x).flatten(0, 1), y.flatten())

    @staticmethod
    def batch():
        tokens = torch.randint(0, VOCABULARY, (BATCH_SIZE, TOKENS))
        return {"x": tokens, "y": (3 * tokens + 1) % VOCABULARY}


class Convnet(nn.Module):
    def __init__(self):
        super().__init__()
        # Without bias, as BatchNorm takes it away.
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.head = nn.Linear(16 * 3 * 3, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        return self.head(x.flatten(1))

    def loss(self, x, y):
        return F.cross_entropy(self(x), y)

    @staticmethod
    def batch():
        labels = torch.randint(0, 10, (BATCH_SIZE,))
        images = torch.randn(BATCH_SIZE, 1, 12, 12)
        images += 0.3 * labels.view(-1, 1, 1, 1)
        return {"x": images, "y": labels}


MODELS = {"transformer": Transformer, "convnet": Convnet}
VARIATIONS = {
    "plain": {},
    "accumulate_2": {"trainer": {"accumulate_grad_batches": 2}},
    "clip_norm": {"trainer": {"gradient_clip_val": 0.5}},
    "clip_value": {"trainer": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}},
    "accumulate_2_clip_norm_schedule": {
        "trainer": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}, "schedule": True},
}
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01),
}


class Module(pl.LightningModule):
    def __init__(self, net, run):
        super().__init__()
        self.net, self.run, self.losses = net, run, []

    def training_step(self, batch, batch_idx):
        loss = self.net.loss(batch["x"], batch["y"])
        self.losses.append(float(loss))
        return loss

    def configure_optimizers(self):
        optimizer = OPTIMIZERS[self.run["optimizer"]](self.parameters())
        if not self.run["schedule"]:
            return optimizer
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 30, gamma=0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Writer:
    def __init__(self, folder):
        self.file = open(os.path.join(folder, "data.bin"), "wb")
        self.tensors = {}

    def add(self, name, tensor):
        dtype = {torch.float32: "float32", torch.int64: "int64"}[tensor.dtype]
        self.tensors[name] = {"dtype": dtype, "shape": list(tensor.shape),
                              "offset": self.file.tell()}
        self.file.write(tensor.detach().contiguous().numpy().tobytes())


def train(run, weights, batches, folder):
    net = MODELS[run["model"]]()
    net.load_state_dict(weights)
    module = Module(net, run)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False,
                         enable_model_summary=False, enable_checkpointing=False,
                         default_root_dir=folder, max_epochs=1, max_steps=STEPS, **run["trainer"])
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return module.losses


def main():
    folder = sys.argv[1]
    torch.set_num_threads(1)
    torch.manual_seed(1)
    writer, runs = Writer(folder), []
    for model, cls in MODELS.items():
        weights = cls().state_dict()
        batches = [cls.batch() for _ in range(BATCHES)]
        for name, tensor in weights.items():
            writer.add(f"{model}.{name}", tensor)
        for key in ("x", "y"):
            writer.add(f"{model}.batches.{key}", torch.stack([batch[key] for batch in batches]))
        for optimizer in OPTIMIZERS:
            for variation, changes in VARIATIONS.items():
                run = {"name": f"{model} {optimizer} {variation}", "model": model,
                       "optimizer": optimizer, "trainer": {}, "schedule": False, **changes}
                with tempfile.TemporaryDirectory() as root:
                    run["losses"] = train(run, weights, batches, root)
                runs.append(run)
    writer.file.close()
    with open(os.path.join(folder, "index.json"), "w") as file:
        json.dump({"tensors": writer.tensors, "batches": BATCHES, "steps": STEPS, "runs": runs},
                  file)


if __name__ == "__main__":
    main()
