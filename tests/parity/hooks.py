"""Runs the configurations of hooks.json under Python Lightning and records every hook call.

    python hooks.py hooks.json OUT [NAME ...]

OUT becomes a JSON file {configuration: [line, ...]}. A line is one call,

    module.training_step(batch 3, 1) | epoch 0 step 3 train | train grad

with who was called, the arguments that matter (a batch by its number in the data), then
trainer.current_epoch, trainer.global_step and the trainer's stage, then the module's mode and
whether gradients are recorded. recorder.cc makes the same lines.
"""

import json
import logging
import sys
import tempfile
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks as pl_callbacks
from lightning.pytorch.loggers.logger import Logger
from torch.utils.data import DataLoader, Dataset, IterableDataset

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

BATCH_SIZE = 2
STAGES = {"train": 0, "val": 100, "test": 500, "predict": 900}


class Rows(Dataset):
    """Each row starts with the number of the batch it belongs to."""

    def __init__(self, first, batches):
        self.first, self.batches = first, batches

    def __len__(self):
        return self.batches * BATCH_SIZE

    def __getitem__(self, i):
        return torch.tensor([float(self.first + i // BATCH_SIZE), 0.5, -0.25, 1.0])


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return (self.rows[i] for i in range(len(self.rows)))


class Run:
    """What the recorders of one configuration share."""

    def __init__(self, config):
        self.config = config
        self.data = {"from": "datamodule", "sized": True, "shuffle": False, "train": 4, "val": [3], "test": [2],
                     "predict": [2], "transfer": False, **config.get("data", {})}
        self.options = {"validation_step": True, "mode_hooks": True, "manual": False,
                        "optimizers": 1, "optimizer": "sgd", **config.get("module", {})}
        self.lines = []
        self.trainer = None
        self.module = None

    def write(self, who, hook, *args):
        trainer, module = self.trainer, self.module
        mode = "train" if module.training else "eval"
        if torch.is_inference_mode_enabled():
            grad = "inference"
        else:
            grad = "grad" if torch.is_grad_enabled() else "no_grad"
        stage = trainer.state.stage.value if trainer.state.stage else "none"
        self.lines.append(
            f"{who}.{hook}({', '.join(args)}) | epoch {trainer.current_epoch} "
            f"step {trainer.global_step} {stage} | {mode} {grad}"
        )

    def act(self, hook, batch_idx=None):
        """Stops or raises where the configuration says so."""

        def due(key):
            at = self.options.get(key)
            return (at is not None and at[0] == hook and at[1] == self.trainer.current_epoch
                    and at[2] in (None, batch_idx))

        if due("stop_in"):
            self.trainer.should_stop = True
        if due("raise_in"):
            raise RuntimeError("boom")

    def loader(self, stage, index=0):
        batches = self.data[stage] if stage == "train" else self.data[stage][index]
        rows = Rows(STAGES[stage] + 100 * index, batches)
        return DataLoader(rows if self.data["sized"] else Stream(rows), batch_size=BATCH_SIZE,
                          shuffle=stage == "train" and self.data["shuffle"])

    def loaders(self, stage):
        if stage == "train":
            return self.loader("train")
        loaders = [self.loader(stage, i) for i in range(len(self.data[stage]))]
        return loaders[0] if len(loaders) == 1 else loaders


def batch_name(batch):
    return f"batch {int(batch[0, 0])}"


def output_name(outputs):
    if outputs is None or (isinstance(outputs, dict) and not outputs):
        return "no output"
    return "output"


class Data(pl.LightningDataModule):
    def __init__(self, run):
        super().__init__()
        self.run = run

    def write(self, hook, *args):
        self.run.write("datamodule", hook, *args)

    def prepare_data(self):
        self.write("prepare_data")

    def setup(self, stage):
        self.write("setup", stage)

    def teardown(self, stage):
        self.write("teardown", stage)

    def train_dataloader(self):
        self.write("train_dataloader")
        return self.run.loaders("train")

    def test_dataloader(self):
        self.write("test_dataloader")
        return self.run.loaders("test")

    def predict_dataloader(self):
        self.write("predict_dataloader")
        return self.run.loaders("predict")

    def state_dict(self):
        self.write("state_dict")
        return {"kept": 1}

    def load_state_dict(self, state):
        self.write("load_state_dict", str(state["kept"]))

    def on_exception(self, exception):
        self.write("on_exception", str(exception))


class Transfer:
    """The hooks that bring a batch to the device, for a module or a data module."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.write("on_before_batch_transfer", batch_name(batch), str(dataloader_idx))
        return super().on_before_batch_transfer(batch, dataloader_idx)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        self.write("transfer_batch_to_device", batch_name(batch), str(device), str(dataloader_idx))
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.write("on_after_batch_transfer", batch_name(batch), str(dataloader_idx))
        return super().on_after_batch_transfer(batch, dataloader_idx)


class ValidationData:
    def val_dataloader(self):
        self.write("val_dataloader")
        return self.run.loaders("val")


def data_class(data):
    bases = []
    if data["transfer"]:
        bases.append(Transfer)
    if data["val"] is not None:
        bases.append(ValidationData)
    return type("RecorderData", (*bases, Data), {})


class RecorderCallback(pl.Callback):
    def __init__(self, run, name="callback"):
        self.run, self.name = run, name

    @property
    def state_key(self):
        return self.name

    def write(self, hook, *args):
        self.run.write(self.name, hook, *args)

    def optimizer(self, optimizer):
        return self.run.module.optimizer_name(optimizer)

    def setup(self, trainer, module, stage):
        self.write("setup", stage)

    def teardown(self, trainer, module, stage):
        self.write("teardown", stage)

    def on_exception(self, trainer, module, exception):
        self.write("on_exception", str(exception))

    def state_dict(self):
        self.write("state_dict")
        return {"kept": 2}

    def load_state_dict(self, state):
        self.write("load_state_dict", str(state["kept"]))

    def on_save_checkpoint(self, trainer, module, checkpoint):
        self.write("on_save_checkpoint")

    def on_load_checkpoint(self, trainer, module, checkpoint):
        self.write("on_load_checkpoint")

    def on_before_zero_grad(self, trainer, module, optimizer):
        self.write("on_before_zero_grad", self.optimizer(optimizer))

    def on_before_backward(self, trainer, module, loss):
        self.write("on_before_backward")

    def on_after_backward(self, trainer, module):
        self.write("on_after_backward")

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.write("on_before_optimizer_step", self.optimizer(optimizer))

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.write("on_train_batch_start", batch_name(batch), str(batch_idx))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.write("on_train_batch_end", output_name(outputs), batch_name(batch), str(batch_idx))


class RecorderCheckpoint(RecorderCallback, pl_callbacks.Checkpoint):
    pass


def add_plain_hooks(cls, names, callback):
    """Hooks without arguments of interest."""

    def make(name):
        if callback:
            def hook(self, trainer, module):
                self.write(name)
        else:
            def hook(self):
                self.write(name)
                self.run.act(name)
        return hook

    for name in names:
        setattr(cls, name, make(name))


def add_batch_hooks(cls, stage, callback):
    """on_<stage>_batch_start and _end with a data loader's index."""

    def start(self, *args):
        batch, batch_idx, dataloader_idx = args[2:] if callback else args
        self.write(f"on_{stage}_batch_start", batch_name(batch), str(batch_idx),
                   str(dataloader_idx))
        if not callback:
            self.run.act(f"on_{stage}_batch_start", batch_idx)

    def end(self, *args):
        outputs, batch, batch_idx, dataloader_idx = args[2:] if callback else args
        self.write(f"on_{stage}_batch_end", output_name(outputs), batch_name(batch),
                   str(batch_idx), str(dataloader_idx))

    # Lightning reads the names of the parameters.
    if callback:
        def batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
            start(self, trainer, module, batch, batch_idx, dataloader_idx)

        def batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
            end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx)
    else:
        def batch_start(self, batch, batch_idx, dataloader_idx=0):
            start(self, batch, batch_idx, dataloader_idx)

        def batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
            end(self, outputs, batch, batch_idx, dataloader_idx)

    setattr(cls, f"on_{stage}_batch_start", batch_start)
    setattr(cls, f"on_{stage}_batch_end", batch_end)


class Recorder(pl.LightningModule):
    def __init__(self, run):
        super().__init__()
        self.run = run
        self.automatic_optimization = not run.options["manual"]
        self.layer = torch.nn.Linear(4, 1)
        self.other = torch.nn.Linear(4, 1)
        if run.options.get("frozen_child"):
            self.other.eval()
        self.known_optimizers, self.known_schedulers = [], []

    def write(self, hook, *args):
        self.run.write("module", hook, *args)

    def optimizer_name(self, optimizer):
        if not self.known_optimizers:
            return "no optimizer"
        optimizer = getattr(optimizer, "optimizer", optimizer)
        return f"optimizer {[id(o) for o in self.known_optimizers].index(id(optimizer))}"

    def loss(self, batch):
        return (self.layer(batch) + self.other(batch)).square().mean()

    def configure_callbacks(self):
        self.write("configure_callbacks")
        if self.run.options.get("configure_callbacks"):
            return [RecorderCallback(self.run, "module_callback")]
        return []

    def configure_model(self):
        self.write("configure_model")

    def prepare_data(self):
        self.write("prepare_data")

    def setup(self, stage):
        self.write("setup", stage)
        self.run.act("setup")

    def teardown(self, stage):
        self.write("teardown", stage)

    def train_dataloader(self):
        self.write("train_dataloader")
        return self.run.loaders("train")

    def val_dataloader(self):
        self.write("val_dataloader")
        return self.run.loaders("val")

    def test_dataloader(self):
        self.write("test_dataloader")
        return self.run.loaders("test")

    def predict_dataloader(self):
        self.write("predict_dataloader")
        return self.run.loaders("predict")

    def configure_optimizers(self):
        self.write("configure_optimizers")
        options = self.run.options
        make = {"sgd": lambda p: torch.optim.SGD(p, lr=1e-6),
                "lbfgs": lambda p: torch.optim.LBFGS(p, lr=1e-6, max_iter=2)}[options["optimizer"]]
        layers = [self.layer, self.other]
        if options["optimizers"] == 0:
            return None
        if options["optimizers"] == 1:
            self.known_optimizers = [make(self.parameters())]
        else:
            self.known_optimizers = [make(layer.parameters()) for layer in layers]
        configs = []
        for one in options.get("schedulers", []):
            optimizer = self.known_optimizers[0]
            if one.get("plateau"):
                scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            else:
                scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
            config = {"scheduler": scheduler, "interval": one["interval"],
                      "frequency": one.get("frequency", 1)}
            if one.get("plateau"):
                config["monitor"] = one.get("monitor", "val_loss")
            configs.append(config)
        self.known_schedulers = [config["scheduler"] for config in configs]
        return self.known_optimizers, configs

    def on_train_batch_start(self, batch, batch_idx):
        self.write("on_train_batch_start", batch_name(batch), str(batch_idx))
        if self.run.options.get("end_epoch_at") == [self.trainer.current_epoch, batch_idx]:
            return -1
        return None

    def training_step(self, batch, batch_idx):
        self.write("training_step", batch_name(batch), str(batch_idx))
        self.run.act("training_step", batch_idx)
        if batch_idx in self.run.options.get("skip_batches", []):
            return None
        loss = self.loss(batch)
        self.log("train_loss", loss.detach(), on_step=True, on_epoch=True)
        if self.automatic_optimization:
            return loss
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        return None

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.write("on_train_batch_end", output_name(outputs), batch_name(batch), str(batch_idx))
        self.run.act("on_train_batch_end", batch_idx)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.write("test_step", batch_name(batch), str(batch_idx), str(dataloader_idx))
        self.run.act("test_step", batch_idx)
        loss = self.loss(batch)
        self.log("test_loss", loss, on_step=True, on_epoch=True)
        return loss

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        self.write("predict_step", batch_name(batch), str(batch_idx), str(dataloader_idx))
        self.run.act("predict_step", batch_idx)
        return self.layer(batch)

    def on_before_zero_grad(self, optimizer):
        self.write("on_before_zero_grad", self.optimizer_name(optimizer))

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        self.write("optimizer_zero_grad", str(epoch), str(batch_idx),
                   self.optimizer_name(optimizer))
        super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def on_before_backward(self, loss):
        self.write("on_before_backward")

    def backward(self, loss):
        self.write("backward")
        super().backward(loss)

    def on_after_backward(self):
        self.write("on_after_backward")

    def on_before_optimizer_step(self, optimizer):
        self.write("on_before_optimizer_step", self.optimizer_name(optimizer))

    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        algorithm = gradient_clip_algorithm
        self.write("configure_gradient_clipping", self.optimizer_name(optimizer),
                   "none" if gradient_clip_val is None else f"{gradient_clip_val:g}",
                   "none" if algorithm is None else getattr(algorithm, "value", algorithm))
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        self.write("optimizer_step", str(epoch), str(batch_idx), self.optimizer_name(optimizer))
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def lr_scheduler_step(self, scheduler, metric):
        index = [id(s) for s in self.known_schedulers].index(id(scheduler))
        self.write("lr_scheduler_step", f"scheduler {index}",
                   "no metric" if metric is None else "metric")
        super().lr_scheduler_step(scheduler, metric)

    def on_validation_model_zero_grad(self):
        self.write("on_validation_model_zero_grad")
        super().on_validation_model_zero_grad()

    def on_save_checkpoint(self, checkpoint):
        self.write("on_save_checkpoint")

    def on_load_checkpoint(self, checkpoint):
        self.write("on_load_checkpoint")


class ModeHooks:
    def on_validation_model_eval(self):
        self.write("on_validation_model_eval")
        self.eval()

    def on_validation_model_train(self):
        self.write("on_validation_model_train")
        self.train()

    def on_test_model_eval(self):
        self.write("on_test_model_eval")
        self.eval()

    def on_test_model_train(self):
        self.write("on_test_model_train")
        self.train()

    def on_predict_model_eval(self):
        self.write("on_predict_model_eval")
        self.eval()


class ValidationStep:
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.write("validation_step", batch_name(batch), str(batch_idx), str(dataloader_idx),
                   "child in train mode" if self.other.training else "child in eval mode")
        self.run.act("validation_step", batch_idx)
        losses = self.run.options.get("val_losses")
        loss = self.loss(batch)
        if losses:
            loss = torch.tensor(losses[min(self.trainer.current_epoch, len(losses) - 1)])
        self.log("val_loss", loss, on_step=True, on_epoch=True)
        return loss


class RecorderLogger(Logger):
    def __init__(self, run, folder):
        super().__init__()
        self.run, self.folder = run, folder

    name = "recorded"
    version = "0"

    @property
    def save_dir(self):
        return self.folder

    def log_metrics(self, metrics, step=None):
        self.run.write("logger", "log_metrics", *sorted(metrics), f"step {step}")

    def log_hyperparams(self, params, *args, **kwargs):
        self.run.write("logger", "log_hyperparams")

    def save(self):
        self.run.write("logger", "save")

    def finalize(self, status):
        self.run.write("logger", "finalize", status)

    def after_save_checkpoint(self, checkpoint_callback):
        self.run.write("logger", "after_save_checkpoint")


EPOCH_HOOKS = [f"on_{stage}_{when}" for stage in ("train", "validation", "test", "predict")
               for when in ("start", "end", "epoch_start", "epoch_end")]
FIT_HOOKS = ["on_fit_start", "on_fit_end"]
add_plain_hooks(RecorderCallback, FIT_HOOKS + EPOCH_HOOKS
                + ["on_sanity_check_start", "on_sanity_check_end"], callback=True)
add_plain_hooks(Recorder, FIT_HOOKS + EPOCH_HOOKS, callback=False)
for stage_name in ("validation", "test", "predict"):
    add_batch_hooks(RecorderCallback, stage_name, callback=True)
    add_batch_hooks(Recorder, stage_name, callback=False)


def module_class(options):
    bases = []
    if options["validation_step"]:
        bases.append(ValidationStep)
    if options["mode_hooks"]:
        bases.append(ModeHooks)
    # The data module's transfer hooks are recorded where it has them.
    if not options.get("no_transfer"):
        bases.append(Transfer)
    return type("RecorderModule", (*bases, Recorder), {})


def make_callbacks(run, specs):
    made, recorders = [], 0
    for spec in specs:
        if spec == "recorder":
            made.append(RecorderCallback(run, f"callback{recorders or ''}"))
            recorders += 1
        elif spec == "recorder_checkpoint":
            made.append(RecorderCheckpoint(run, "checkpoint"))
        else:
            (name, arguments), = spec.items()
            made.append(getattr(pl_callbacks, name)(**arguments))
    return made


def fill(node, folder):
    return json.loads(json.dumps(node).replace("$DIR", folder))


def run_configuration(config, folder):
    config = fill(config, folder)
    run = Run(config)
    run.options["no_transfer"] = run.data["transfer"]
    flags = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False,
             "enable_model_summary": False, "enable_checkpointing": False, "max_epochs": 2,
             "default_root_dir": folder, **config.get("trainer", {})}

    def make(overrides):
        flags.update(overrides)
        arguments = {**flags, "callbacks": make_callbacks(run, config.get("callbacks",
                                                                          ["recorder"]))}
        if config.get("logger"):
            arguments["logger"] = RecorderLogger(run, folder)
        run.module = module_class(run.options)(run)
        run.trainer = pl.Trainer(**arguments)
        return data_class(run.data)(run)

    data = make({})
    torch.manual_seed(0)  # the order of a shuffled loader
    for entry in config.get("runs", ["fit"]):
        entry = {"entry": entry} if isinstance(entry, str) else entry
        if "trainer" in entry:
            data = make(entry["trainer"])
        name = entry["entry"]
        arguments = {"ckpt_path": entry.get("ckpt_path")}
        if run.data["from"] == "datamodule":
            arguments["datamodule"] = data
        elif run.data["from"] == "arguments":
            arguments.update(train_dataloaders=run.loaders("train"),
                             val_dataloaders=run.loaders("val"))
        try:
            result = getattr(run.trainer, name)(run.module, **arguments)
        except Exception as error:  # what a hook raised
            run.write("run", name, f"raised {error}")
            continue
        shape = ""
        if name in ("validate", "test"):
            shape = " and ".join(" ".join(sorted(loader)) for loader in result)
        elif name == "predict":
            nested = result if isinstance(result[0], list) else [result]
            shape = " and ".join(f"{len(loader)} batches" for loader in nested)
        run.write("run", name, *([shape] if shape else []),
                  "child in train mode" if run.module.other.training else "child in eval mode")
    return run.lines


def main():
    (configurations, out), names = sys.argv[1:3], sys.argv[3:]
    torch.set_num_threads(1)
    with open(configurations) as file:
        configurations = json.load(file)
    recorded = {}
    for name, config in configurations.items():
        if names and name not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            recorded[name] = run_configuration(config, folder)
    with open(out, "w") as file:
        json.dump(recorded, file, indent=0)


if __name__ == "__main__":
    main()
