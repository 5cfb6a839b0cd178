"""The runs of cases.json under Python Lightning, and what Python makes of the checkpoints of C++.

    python interop.py write cases.json FOLDER     FOLDER/py/CASE/epoch=E-step=S.ckpt of 3 epochs each, and in
                                                  FOLDER/py_again the third resumed, where that differs
    python interop.py check cases.json FOLDER     reads FOLDER/cpp and FOLDER/cpp_resumed beside it, resumes
                                                  FOLDER/cpp into FOLDER/py_resumed, prints JSON:

    {CASE: {"structure": [...], "values": [...], "resumed by C++": [...], "resumed by Python": [...],
            "taken by Python": [...]}}

where each list holds what differs or fails, one line for each. runs.cc has the same model, data and callbacks.
"""

import glob
import json
import logging
import os
import sys
import traceback
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.set_num_threads(1)

EPOCHS = 3
# Keys of the C++ side's own, which Python passes over.
OWN_KEYS = {"exact_resume"}


def numbers(count, factor, modulus):
    """Fixed numbers from -0.5 to 0.5, the same wherever they are computed."""
    return (torch.arange(count) * factor % modulus).to(torch.float32) / modulus - 0.5


def rows(first, count):
    x = numbers(1000, 37, 101)[first * 4 : (first + count) * 4].reshape(count, 4)
    return TensorDataset(x, torch.arange(first, first + count) * 5 % 3)


class Data(pl.LightningDataModule):
    def __init__(self, batch_size=4, folder="data"):
        super().__init__()
        self.save_hyperparameters()
        self.loaded = None

    def train_dataloader(self):
        return DataLoader(rows(0, 24), batch_size=self.hparams.batch_size)

    def val_dataloader(self):
        return DataLoader(rows(24, 8), batch_size=self.hparams.batch_size)

    def state_dict(self):
        return {"token": "seven", "position": {"shard": 3, "offsets": [1, 2, 3]}}

    def load_state_dict(self, state):
        self.loaded = state


class Net(pl.LightningModule):
    # Set before a run; load_from_checkpoint builds the module without it.
    case = {}

    def __init__(self, hidden=16, scale=0.5, name="net", sizes=(1, 2), flag=True, nothing=None):
        super().__init__()
        if self.case.get("hparams", True):
            sizes = list(sizes)
            self.save_hyperparameters()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, hidden), torch.nn.BatchNorm1d(hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 3)
        )
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(numbers(p.numel(), 31 + 2 * i, 97).reshape(p.shape))
        self.automatic_optimization = not self.case.get("manual", False)
        self.seen = None

    def loss(self, batch):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        if not self.automatic_optimization:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
        return loss

    def on_train_epoch_end(self):
        if not self.automatic_optimization:
            for schedule in self.lr_schedulers():
                schedule.step()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        parts = [list(self.parameters())]
        if len(self.case["optimizers"]) == 2:
            parts = [list(self.net[0].parameters()), [p for layer in list(self.net)[1:] for p in layer.parameters()]]
        optimizers = [
            getattr(torch.optim, name)(params, **options)
            for params, (name, options) in zip(parts, self.case["optimizers"])
        ]
        schedules = []
        for one in self.case.get("schedulers", []):
            make = getattr(torch.optim.lr_scheduler, one["name"])
            schedule = {"scheduler": make(optimizers[one.get("of", 0)], **one["options"])}
            schedule["interval"] = one.get("interval", "epoch")
            if "monitor" in one:
                schedule["monitor"] = one["monitor"]
            schedules.append(schedule)
        return optimizers, schedules

    def on_save_checkpoint(self, checkpoint):
        checkpoint["of the module"] = {"note": "Grüße", "pair": (1, 2.5), "big": 2**40}

    def on_load_checkpoint(self, checkpoint):
        self.seen = checkpoint.get("of the module")


def trainer_of(case, folder):
    callbacks = [EarlyStopping("val_loss", patience=10)] if case.get("early_stopping", True) else []
    weights_only = case.get("weights_only", False)
    callbacks.append(
        ModelCheckpoint(dirpath=folder, monitor="val_loss", save_top_k=-1, save_weights_only=weights_only)
    )
    return pl.Trainer(
        accelerator="cpu", max_epochs=EPOCHS, logger=False, callbacks=callbacks, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder, **case.get("trainer", {})
    )


def fit(case, folder, ckpt_path=None):
    Net.case = case
    trainer, module = trainer_of(case, folder), Net()
    if case.get("datamodule", True):
        data = Data()
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    else:
        data = None
        trainer.fit(module, Data().train_dataloader(), Data().val_dataloader(), ckpt_path=ckpt_path)
    return module, data


def saved(folder, epoch):
    """The checkpoint that a run left at the end of an epoch."""
    found = glob.glob(f"{folder}/epoch={epoch}-step=*.ckpt")
    assert len(found) == 1, f"{folder} holds {sorted(os.listdir(folder))}"
    return found[0]


# ---- Comparing ---------------------------------------------------------------------------------------------------


def plain_path(text):
    for name in ("py", "py_again", "py_resumed", "cpp", "cpp_resumed"):
        text = text.replace(f"/{name}/", "/RUN/")
    return text


def differences(a, b, path=""):
    """What differs between Python's a and C++'s b, in types, order and values: (kind, line)."""
    where = path or "the file"
    if type(a) is not type(b):
        yield "structure", f"{where}: {type(a).__name__} {a!r:.60} / {type(b).__name__} {b!r:.60}"
    elif isinstance(a, dict):
        keys_a, keys_b = [plain_path(str(k)) for k in a], [plain_path(str(k)) for k in b]
        if not path:
            keys_a, keys_b = ([k for k in keys if k not in OWN_KEYS] for keys in (keys_a, keys_b))
        if keys_a != keys_b:
            only_a, only_b = [k for k in keys_a if k not in keys_b], [k for k in keys_b if k not in keys_a]
            detail = f"only Python {only_a}, only C++ {only_b}" if only_a or only_b else f"order {keys_a} / {keys_b}"
            yield "structure", f"{where}: {detail}"
        by_name = {plain_path(str(k)): (k, v) for k, v in b.items()}
        for key, value in a.items():
            if plain_path(str(key)) in by_name:
                other, other_value = by_name[plain_path(str(key))]
                if type(key) is not type(other):
                    yield "structure", f"{where}: key {key!r} / {other!r}"
                yield from differences(value, other_value, f"{path}.{key}" if path else str(key))
        if getattr(a, "_metadata", None) != getattr(b, "_metadata", None):
            yield "structure", f"{where}._metadata: {getattr(a, '_metadata', None)} / {getattr(b, '_metadata', None)}"
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            yield "structure", f"{where}: {len(a)} items / {len(b)}"
        for i, (x, y) in enumerate(zip(a, b)):
            yield from differences(x, y, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        layout = [(t.dtype, tuple(t.shape), t.stride(), t.requires_grad, t.device.type) for t in (a, b)]
        if layout[0] != layout[1]:
            yield "structure", f"{where}: {layout[0]} / {layout[1]}"
        elif not torch.equal(a, b) and not (a.isnan() & b.isnan() | (a == b)).all():
            apart = (a.double() - b.double()).abs().max().item()
            yield "values", f"{where}: {int((a != b).sum())} of {a.numel()} differ, by {apart:.3g} at most"
    elif isinstance(a, str):
        if plain_path(a) != plain_path(b):
            yield "values", f"{where}: {a!r} / {b!r}"
    elif a != b and not (a != a and b != b):
        yield "values", f"{where}: {a!r} / {b!r}"


def compare(a, b, ignore=()):
    found = {"structure": [], "values": []}
    for kind, line in differences(torch.load(a, weights_only=True), torch.load(b, weights_only=True)):
        if not line.startswith(tuple(ignore)):
            found[kind].append(line)
    return found


# A resumed ModelCheckpoint with another folder begins anew.
NEW_FOLDER = ("callbacks.ModelCheckpoint",)


def attempt(lines, what, action):
    try:
        action()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        lines.append(f"{what}: {type(error).__name__}: {str(error)[:300]} ({os.path.basename(last.filename)}:{last.lineno})")


def take(case, path):
    """What Python does with one file of C++."""
    lines = []
    Net.case = case
    whole = torch.load(path, weights_only=True)

    def mapped():
        found = torch.load(path, weights_only=True, mmap=True)
        lines.extend(line for _, line in differences(whole, found))

    def meta():
        found = torch.load(path, weights_only=True, map_location="meta")
        for name, tensor in found["state_dict"].items():
            assert tensor.is_meta and tensor.shape == whole["state_dict"][name].shape, name

    def from_checkpoint():
        module = Net.load_from_checkpoint(path)
        assert dict(module.hparams) == whole.get("hyper_parameters", {}), dict(module.hparams)
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, whole["state_dict"][name]), name
        assert module.seen == {"note": "Grüße", "pair": (1, 2.5), "big": 2**40}, module.seen
        if case.get("datamodule", True):
            assert Data.load_from_checkpoint(path).loaded == Data().state_dict()

    def validate():
        trainer = trainer_of(case, os.path.dirname(path))
        loss = trainer.validate(Net(), datamodule=Data(), ckpt_path=path, verbose=False)[0]["val_loss"]
        if not case.get("weights_only"):
            score = next(s for k, s in whole["callbacks"].items() if k.startswith("ModelCheckpoint"))["current_score"]
            assert loss == score.item(), f"{loss} / {score}"

    attempt(lines, "torch.load(mmap=True)", mapped)
    attempt(lines, "torch.load(map_location='meta')", meta)
    attempt(lines, "load_from_checkpoint", from_checkpoint)
    attempt(lines, "validate(ckpt_path)", validate)
    return lines


def forgets(case):
    """Python saves before a plateau schedule's step at the end of the epoch, which a resumed run then lacks."""
    return any(one["name"] == "ReduceLROnPlateau" for one in case.get("schedulers", []))


def check(name, case, root):
    py, cpp = f"{root}/py/{name}", f"{root}/cpp/{name}"
    reference = f"{root}/py_again/{name}" if forgets(case) else py
    report = {"structure": [], "values": [], "resumed by C++": [], "resumed by Python": [], "taken by Python": []}

    def uninterrupted():
        for epoch in (1, 2):
            for kind, lines in compare(saved(py, epoch), saved(cpp, epoch)).items():
                report[kind] += [f"epoch {epoch}: {line}" for line in lines]

    def resumed_by_cpp():
        found = compare(saved(reference, 2), saved(f"{root}/cpp_resumed/{name}", 2), NEW_FOLDER)
        report["resumed by C++"] += found["structure"] + found["values"]

    def resumed_by_python():
        folder = f"{root}/py_resumed/{name}"
        module, data = fit(case, folder, ckpt_path=saved(cpp, 1))
        assert data is None or data.loaded == data.state_dict(), f"the data module got {data.loaded}"
        found = compare(saved(reference, 2), saved(folder, 2), NEW_FOLDER)
        report["resumed by Python"] += found["structure"] + found["values"]

    attempt(report["structure"], "reading", uninterrupted)
    attempt(report["taken by Python"], "taking", lambda: report["taken by Python"].extend(take(case, saved(cpp, 1))))
    if not case.get("weights_only"):
        attempt(report["resumed by C++"], "comparing", resumed_by_cpp)
        attempt(report["resumed by Python"], "resuming", resumed_by_python)
    return report


def main(command, cases, root):
    with open(cases) as file:
        cases = json.load(file)
    if command == "write":
        for name, case in cases.items():
            fit(case, f"{root}/py/{name}")
            if forgets(case):
                fit(case, f"{root}/py_again/{name}", ckpt_path=saved(f"{root}/py/{name}", 1))
        return
    json.dump({name: check(name, case, root) for name, case in cases.items()}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
