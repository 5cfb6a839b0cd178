"""Writes the files that the fuzzers begin with, into the folder seeds/ beside this script.

They are small, since most mutations of a long file change the same kind of byte. What they must
have between them is one of everything that a reader treats in a way of its own. Made by torch
2.11.0, lightning 2.6.6 and safetensors 0.8.0; run it again when a reader learns a new form:

  .venv/bin/python tests/fuzz/seeds.py
"""

import collections
import io
import pathlib
import pickle
import tempfile
import warnings
import zipfile

import lightning
import numpy
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

SEEDS = pathlib.Path(__file__).parent / "seeds"


class Unknown:
    def __init__(self):
        self.a = 1


def tensors():
    base = torch.arange(12.0)
    state_dict = collections.OrderedDict(weight=base[2:8].view(2, 3).t(), bias=base[:2])
    state_dict._metadata = collections.OrderedDict([("", {"version": 1})])
    return {
        "state_dict": state_dict,
        "parameter": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
        "zero_dim": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "conj": torch.tensor([1 + 2j]).conj(),
        "fp8": torch.ones(2).to(torch.float8_e4m3fn),
        "uint16": torch.ones(2, dtype=torch.uint16),
        "bool": torch.tensor([True, False]),
        "expanded": torch.ones(1).expand(5),
        "buffer": torch.nn.Buffer(torch.ones(1)),
        "sparse": torch.eye(2).to_sparse(),
        "meta": torch.empty(3, device="meta"),
    }


def values():
    shared = ["shared"]
    return {
        "ints": [0, -1, 255, 65535, 2**31, 2**40, -(2**70), 3**200],
        "floats": (1.5, float("nan"), -0.0, 1j),
        "texts": ["", "ä", "日本", "x" * 300, "\ud800"],
        "bytes": [b"", bytes(range(120, 140)), bytearray(b"abc"), b"z" * 260],
        "sets": [set(), {1, "a"}, frozenset([(2, 3)])],
        "shared": (shared, shared, {"s": shared}),
        None: True,
        (1, "k"): collections.OrderedDict(b=1),
        "default": collections.defaultdict(list, a=[1]),
        "counter": collections.Counter("aab"),
        "numpy": [numpy.float64(1.5), numpy.arange(3, dtype="int16")],
        "torch": [torch.Size([2, 3]), torch.float32, torch.device("cuda:0")],
        "unknown": [Unknown(), Unknown, print, pathlib.PurePosixPath("/a")],
    }


def trainer_checkpoint(path):
    class Module(lightning.LightningModule):
        def __init__(self, lr=0.1):
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            loss = self.layer(batch).sum()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_steps=1, accelerator="cpu", logger=False, default_root_dir=folder,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            callbacks=[lightning.pytorch.callbacks.EarlyStopping("loss", check_on_train_epoch_end=True)],
        )
        trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(2, 1)))
        trainer.save_checkpoint(path)


def zip_program(path):
    """The records of a file of torch.save as a zip program packs them: no alignment, no zip64."""
    saved = io.BytesIO()
    torch.save([torch.ones(2), "a"], saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(path, "w") as packed:
        packed.writestr(zipfile.ZipInfo("archive/", (2000, 1, 1, 0, 0, 0)), b"")
        for name in source.namelist():
            packed.writestr(zipfile.ZipInfo(name, (2000, 1, 1, 0, 0, 0)), source.read(name))


def sharded():
    """Two ranks' halves of a matrix, an empty chunk, a scalar and a value, as dcp.save has them."""
    properties = TensorProperties(dtype=torch.float32)
    size = torch.Size
    chunk = lambda at, n: ChunkStorageMetadata(size(at), size(n))
    info = lambda file, at, length: _StorageInfo(file, at, length)
    return Metadata(
        {
            "model.w": TensorStorageMetadata(
                properties, size((5, 6)),
                [chunk((0, 0), (3, 6)), chunk((3, 0), (2, 6)), chunk((5, 0), (0, 6))]),
            "model.step": TensorStorageMetadata(properties, size(()), [chunk((), ())]),
            "optimizer.0.lr": BytesStorageMetadata(),
        },
        {"model.w": ("model", "w"), "model.step": ("model", "step"),
         "optimizer.0.lr": ("optimizer", 0, "lr")},
        {
            MetadataIndex("optimizer.0.lr"): info("__0_0.distcp", 0, 700),
            MetadataIndex("model.w", size((0, 0)), 0): info("__0_0.distcp", 700, 1600),
            MetadataIndex("model.w", size((3, 0)), 1): info("__1_0.distcp", 0, 1500),
            MetadataIndex("model.step", size(()), 0): info("__0_0.distcp", 2300, 1500),
        },
    )


def main():
    warnings.simplefilter("ignore")
    SEEDS.mkdir(exist_ok=True)
    torch.manual_seed(0)
    torch.save(tensors(), SEEDS / "tensors.pt")
    torch.save([torch.ones(3)], SEEDS / "small.pt")
    zip_program(SEEDS / "zip_program.pt")
    trainer_checkpoint(SEEDS / "trainer.ckpt")
    for protocol in (2, 5):
        (SEEDS / f"values_{protocol}.pickle").write_bytes(pickle.dumps(values(), protocol))
    with tempfile.TemporaryDirectory() as folder:
        dcp.save({"model": {"w": torch.ones(2, 3)}, "lr": 0.1}, checkpoint_id=folder, no_dist=True)
        (SEEDS / "saved.metadata").write_bytes((pathlib.Path(folder) / ".metadata").read_bytes())
    for protocol in (2, 4):
        (SEEDS / f"sharded_{protocol}.metadata").write_bytes(pickle.dumps(sharded(), protocol))
    several = {
        "a": torch.ones(2, 3), "b.c": torch.ones(2, dtype=torch.bfloat16), "ä": torch.zeros(0, 4),
        "s": torch.tensor(1), "flags": torch.tensor([True]), "f8": torch.ones(3).to(torch.float8_e5m2),
    }
    safetensors.torch.save_file(several, SEEDS / "several.safetensors", {"format": "pt", "k": "\n\""})
    safetensors.torch.save_file({"w": torch.ones(1)}, SEEDS / "small.safetensors")
    for path in sorted(SEEDS.iterdir()):
        print(path.stat().st_size, path.name)


if __name__ == "__main__":
    main()
