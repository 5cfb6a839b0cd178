"""A GPT of 1.3 B parameters in shards over two GPUs, through Python Lightning's Trainer.fit with
its FSDPStrategy; the peer of fsdp.cc, which says what --variants are: true, mixed, checkpointing.

With --accelerator cpu it runs under ddp, for FSDPStrategy wants GPUs: the numbers mean nothing
then.
"""

import argparse
import os
import shutil
import tempfile
import time

import torch
from step_window import CSVLogger, StepWindow, pl, report, report_values
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

try:
    from lightning.pytorch.strategies import FSDPStrategy
except ImportError:
    from pytorch_lightning.strategies import FSDPStrategy


class Linear(nn.Linear):
    """FSDP calls reset_parameters() when it gives a model from the meta device its weights."""

    def __init__(self, inputs, outputs, std=0.02):
        self.std = std
        super().__init__(inputs, outputs)

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=self.std)
        nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    def reset_parameters(self):
        nn.init.normal_(self.weight, std=0.02)


class Block(nn.Module):
    def __init__(self, width, heads, layers):
        super().__init__()
        added = 0.02 / (2 * layers) ** 0.5
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = Linear(width, 3 * width), Linear(width, width, std=added)
        self.up, self.down = Linear(width, 4 * width), Linear(4 * width, width, std=added)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.heads, C // self.heads).transpose(1, 2)
                   for part in self.qkv(self.norm1(x)).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """The head has the weight of the embedding."""

    def __init__(self, layers, width, heads, vocabulary, context):
        super().__init__()
        self.tokens, self.positions = Embedding(vocabulary, width), Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, layers) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, x, y):
        positions = torch.arange(x.shape[1], device=x.device)
        h = self.norm(self.blocks(self.tokens(x) + self.positions(positions)))
        logits = F.linear(h, self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


class Model(pl.LightningModule):
    def __init__(self, options):
        super().__init__()
        self.options, self.net, self.last_loss = options, None, None

    def configure_model(self):
        if self.net is None:
            o = self.options
            with torch.device("cpu" if o.accelerator == "cpu" else "meta"):
                self.net = GPT(o.layers, o.width, o.heads, o.vocabulary, o.context)

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0], batch[1])
        self.log("train_loss", loss)
        self.last_loss = loss.detach()
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-4, fused=True)


class End(pl.Callback):
    """What is asked of all ranks once fit has run its steps."""

    def __init__(self, folder, window):
        self.folder, self.window, self.values, self.saved = folder, window, {}, None

    def on_train_end(self, trainer, module):
        strategy = trainer.strategy
        peak = torch.tensor(self.window.peak_gigabytes(), device=module.last_loss.device)
        self.values = {
            "last_loss": strategy.reduce(module.last_loss.float(), reduce_op="mean").item(),
            "highest_peak_gb": strategy.reduce(peak, reduce_op="max").item(),
        }
        if self.folder:
            self.save_and_load(trainer)

    def save_and_load(self, trainer):
        path = os.path.join(self.folder, "sharded.ckpt")
        save = self.seconds(trainer, lambda: trainer.save_checkpoint(path))
        # Under FSDPStrategy this puts the model's and the optimizer's state in place too.
        load = self.seconds(trainer, lambda: trainer.strategy.load_checkpoint(path))
        if trainer.is_global_zero:
            gigabytes = sum(os.path.getsize(os.path.join(folder, name))
                            for folder, _, names in os.walk(path) for name in names) / 1e9
            self.saved = {"save_s": save, "load_s": load, "saved_gb": gigabytes}
            shutil.rmtree(path, ignore_errors=True)

    @staticmethod
    def seconds(trainer, work):
        def wait():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            trainer.strategy.barrier()

        wait()
        begin = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - begin


def strategy_of(o, variant):
    if o.accelerator == "cpu":
        return "ddp"
    policies = {"auto_wrap_policy": {Block}}
    if variant == "checkpointing":
        policies["activation_checkpointing_policy"] = {Block}
    return FSDPStrategy(state_dict_type="sharded", **policies)


def data(o, steps):
    """Every step sees the same tokens."""
    rows = torch.randint(0, o.vocabulary, (o.devices * o.batch, o.context + 1)).repeat(steps, 1)
    return DataLoader(TensorDataset(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()),
                      batch_size=o.batch, pin_memory=torch.cuda.is_available())


def measure(o, variant, folder):
    torch.manual_seed(0)
    window = StepWindow(o.warmup, o.steps, o.windows)
    end = End(o.checkpoint if variant == "true" else None, window)
    model = Model(o)
    trainer = pl.Trainer(max_steps=window.total, accelerator=o.accelerator, devices=o.devices,
                         strategy=strategy_of(o, variant), enable_checkpointing=False,
                         precision="bf16-mixed" if variant == "mixed" else "bf16-true",
                         default_root_dir=folder, logger=CSVLogger(folder), benchmark=True,
                         callbacks=[window, end])
    trainer.fit(model, data(o, window.total))
    if not trainer.is_global_zero:
        return
    parameters = o.layers * (12 * o.width**2 + 13 * o.width) + (
        o.vocabulary + o.context + 2) * o.width
    flops = 6 * parameters + 12 * o.layers * o.width * o.context
    report(f"{o.name}_{variant}", window, o.devices * o.batch * o.context, flops / o.devices,
           o.results, **end.values)
    if end.saved:
        report_values(f"{o.name}_save", end.saved, o.results)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", default="fsdp")
    parser.add_argument("--variants", default="true", choices=("true", "mixed", "checkpointing"))
    for name, value in (("layers", 24), ("width", 2048), ("heads", 16), ("vocabulary", 50304),
                        ("context", 2048), ("batch", 8), ("devices", 2), ("warmup", 5),
                        ("steps", 8), ("windows", 2)):
        parser.add_argument("--" + name, type=int, default=value)
    parser.add_argument("--accelerator", default="cuda")
    parser.add_argument("--checkpoint", default=None)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--results", default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(options, options.variants, folder)


if __name__ == "__main__":
    main()
