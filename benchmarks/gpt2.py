"""A step of GPT-2 through Python Lightning's Trainer.fit, with all default callbacks and a CSV
logger, on random tokens; the peer of gpt2.cc.

Each of --variants is measured in turn: eager, compile (torch.compile), reduce-overhead
(torch.compile(mode="reduce-overhead")), trainer and bare (SGD through the Trainer, and in a loop
without it: their difference is what the Trainer costs).
"""

import argparse
import gc
import tempfile
import traceback

import torch
from step_window import CSVLogger, StepWindow, pl, report
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.heads, C // self.heads).transpose(1, 2)
                   for part in self.qkv(self.norm1(x)).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, layers, width, heads, vocabulary, context):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            for linear in (block.proj, block.down):
                nn.init.normal_(linear.weight, std=0.02 / (2 * layers) ** 0.5)

    def forward(self, x, y):
        positions = torch.arange(x.shape[1], device=x.device)
        logits = self.head(self.norm(self.blocks(self.tokens(x) + self.positions(positions))))
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


class Model(pl.LightningModule):
    def __init__(self, options, variant):
        super().__init__()
        self.options, self.variant = options, variant

    def configure_model(self):
        o = self.options
        self.net = GPT(o.layers, o.width, o.heads, o.vocabulary, o.context)
        self.run = self.net
        if self.variant == "compile":
            self.run = torch.compile(self.net)
        elif self.variant == "reduce-overhead":
            self.run = torch.compile(self.net, mode="reduce-overhead")

    def training_step(self, batch, batch_idx):
        if self.variant == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        loss = self.run(batch[0], batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        if self.variant in ("trainer", "bare"):
            return torch.optim.SGD(self.parameters(), lr=1e-3)
        return torch.optim.AdamW(self.parameters(), lr=3e-4, fused=True)


def data(o, steps):
    """As many batches as there are steps, and one epoch."""
    rows = torch.randint(0, o.vocabulary, (o.batch * steps, o.context + 1))
    return DataLoader(TensorDataset(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()),
                      batch_size=o.batch, pin_memory=torch.cuda.is_available())


def bare(model, loader, window, device):
    model.configure_model()
    model.to(device)
    optimizer = model.configure_optimizers()
    for x, y in loader:
        loss = model.run(x.to(device, non_blocking=True), y.to(device, non_blocking=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        window.count()


def measure(o, variant):
    torch.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    window = StepWindow(o.warmup, o.steps, o.windows)
    model = Model(o, variant)
    loader = data(o, window.total)
    if variant == "bare":
        bare(model, loader, window, torch.device("cuda" if o.accelerator == "cuda" else "cpu"))
    else:
        with tempfile.TemporaryDirectory(dir=o.folder) as folder:
            pl.Trainer(max_steps=window.total, accelerator=o.accelerator, devices=1,
                       precision="32-true" if variant == "trainer" else o.precision,
                       default_root_dir=folder, logger=CSVLogger(folder), benchmark=True,
                       callbacks=[window]).fit(model, loader)
    parameters = sum(p.numel() for p in model.net.parameters())
    flops = 6 * parameters + 12 * o.layers * o.width * o.context
    report(f"{o.name}_{variant}", window, o.batch * o.context, flops, o.results)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", default="gpt2")
    parser.add_argument("--variants", default="eager,compile")
    for name, value in (("layers", 12), ("width", 768), ("heads", 12), ("vocabulary", 50304),
                        ("context", 1024), ("batch", 32), ("warmup", 20), ("steps", 30),
                        ("windows", 2)):
        parser.add_argument("--" + name, type=int, default=value)
    parser.add_argument("--accelerator", default="cuda")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--folder", default=None)
    parser.add_argument("--results", default=None)
    options = parser.parse_args()
    failed = False
    for variant in options.variants.split(","):
        try:
            measure(options, variant)
        except Exception:
            traceback.print_exc()
            failed = True
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
