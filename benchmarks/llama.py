"""A step of a language model in the manner of Llama with 1.2 billion parameters through Python
Lightning's Trainer.fit, compiled, on random tokens; the peer of llama.cc.
"""

import argparse
import tempfile
import traceback

import torch
from step_window import CSVLogger, StepWindow, pl, report
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def rotated(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Block(nn.Module):
    def __init__(self, o):
        super().__init__()
        self.heads, self.kv_heads, self.size = o.heads, o.kv_heads, o.width // o.heads
        self.norm1, self.norm2 = nn.RMSNorm(o.width, eps=1e-5), nn.RMSNorm(o.width, eps=1e-5)
        self.qkv = nn.Linear(o.width, (o.heads + 2 * o.kv_heads) * self.size, bias=False)
        self.proj = nn.Linear(o.width, o.width, bias=False)
        self.gate_up = nn.Linear(o.width, 2 * o.hidden, bias=False)
        self.down = nn.Linear(o.hidden, o.width, bias=False)

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        parts = self.qkv(self.norm1(x)).split(
            [C, self.kv_heads * self.size, self.kv_heads * self.size], dim=2)
        q, k, v = (part.view(B, T, -1, self.size).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(rotated(q, cos, sin), rotated(k, cos, sin), v,
                                           is_causal=True, enable_gqa=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, C))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    def __init__(self, o):
        super().__init__()
        self.tokens = nn.Embedding(o.vocabulary, o.width)
        self.blocks = nn.ModuleList(Block(o) for _ in range(o.layers))
        self.norm = nn.RMSNorm(o.width, eps=1e-5)
        self.head = nn.Linear(o.width, o.vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        size = o.width // o.heads
        frequencies = 500000.0 ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
        angles = torch.outer(torch.arange(o.context, dtype=torch.float32), frequencies)
        angles = torch.cat((angles, angles), dim=-1)
        dtype = self.tokens.weight.dtype
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)

    def forward(self, x, y):
        h = self.tokens(x)
        for block in self.blocks:
            h = block(h, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(h)).flatten(0, 1), y.flatten())


class Model(pl.LightningModule):
    def __init__(self, options, variant):
        super().__init__()
        self.options, self.variant = options, variant

    def configure_model(self):
        self.net = Llama(self.options)
        self.run = torch.compile(self.net) if self.variant == "compile" else self.net

    def training_step(self, batch, batch_idx):
        loss = self.run(batch[0], batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)


def measure(o, variant):
    torch.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    window = StepWindow(o.warmup, o.steps, o.windows)
    model = Model(o, variant)
    rows = torch.randint(0, o.vocabulary, (o.batch * window.total, o.context + 1))
    loader = DataLoader(TensorDataset(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()),
                        batch_size=o.batch, pin_memory=torch.cuda.is_available())
    with tempfile.TemporaryDirectory(dir=o.folder) as folder:
        # A checkpoint of several GB at the end of the only epoch would be beside the point.
        pl.Trainer(max_steps=window.total, accelerator=o.accelerator, devices=1,
                   precision=o.precision, default_root_dir=folder,
                   logger=CSVLogger(folder), benchmark=True,
                   callbacks=[window], enable_checkpointing=False).fit(model, loader)
    parameters = sum(p.numel() for p in model.net.parameters())
    flops = 6 * parameters + 12 * o.layers * o.width * o.context
    report(f"{o.name}_{variant}", window, o.batch * o.context, flops, o.results)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", default="llama")
    parser.add_argument("--variants", default="compile")
    for name, value in (("layers", 16), ("width", 2048), ("heads", 32), ("kv_heads", 8),
                        ("hidden", 8192), ("vocabulary", 128256), ("context", 2048), ("batch", 8),
                        ("warmup", 8), ("steps", 10), ("windows", 1)):
        parser.add_argument("--" + name, type=int, default=value)
    parser.add_argument("--accelerator", default="cuda")
    parser.add_argument("--precision", default="bf16-true")
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
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
