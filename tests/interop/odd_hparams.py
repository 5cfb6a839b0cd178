"""A Trainer checkpoint whose hyper-parameters are of all kinds, and what is to be read of them.

    python odd_hparams.py FOLDER     writes FOLDER/epoch=E-step=S.ckpt, prints the plain values as JSON
"""

import argparse
import collections
import dataclasses
import datetime
import enum
import functools
import json
import os
import pathlib
import sys

import numpy
import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import interop  # noqa: E402


class Color(enum.Enum):
    RED = "red"


class Size(enum.IntEnum):
    BIG = 3


class Mode(enum.Enum):
    """Stored as Python 3.11.2 stores every enum: by the member's name."""

    FAST = 1

    def __reduce_ex__(self, protocol):
        return getattr, (self.__class__, self._name_)


def stored(member):
    """What the checkpoint has of a member of an enum: its value, with some versions of Python its name."""
    return member.name if member.__reduce_ex__(2)[0] is getattr else member.value


@dataclasses.dataclass
class Layer:
    width: int
    bias: bool


counts = collections.defaultdict(int)
counts["a"] = 1

# The value, and what a configuration can hold of it.
ODD = {
    "path": (pathlib.Path("data/train"), "data/train"),
    "absolute": (pathlib.PurePosixPath("/data/x y"), "/data/x y"),
    "here": (pathlib.Path("."), "."),
    "np_float64": (numpy.float64(0.25), 0.25),
    "np_float32": (numpy.float32(0.5), 0.5),
    "np_int64": (numpy.int64(-7), -7),
    "np_uint8": (numpy.uint8(200), 200),
    "np_bool": (numpy.bool_(True), True),
    "namespace": (argparse.Namespace(lr=0.1, sizes=[1, 2]), {"lr": 0.1, "sizes": [1, 2]}),
    "color": (Color.RED, stored(Color.RED)),
    "size": (Size.BIG, stored(Size.BIG)),
    "mode": (Mode.FAST, "FAST"),
    "layer": (Layer(3, True), {"width": 3, "bias": True}),
    "nested": ({"a": {"b": {1: "x", (1, 2): None, None: [()]}}}, {"a": {"b": {"1": "x", "(1, 2)": None, "None": [[]]}}}),
    "counts": (counts, {"a": 1}),
    "ordered": (collections.OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
    "dtype": (torch.bfloat16, "torch.bfloat16"),
    "device": (torch.device("cuda", 1), "cuda:1"),
    "cpu": (torch.device("cpu"), "cpu"),
    "shape": (torch.Size([2, 3]), [2, 3]),
    "tensor": (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
    "scalar": (torch.tensor(1.5), 1.5),
    "parameter": (torch.nn.Parameter(torch.tensor([0.5])), [0.5]),
    "set": ({7}, [7]),
    "frozen": (frozenset(["x"]), ["x"]),
    "tuple": ((1, ("a", 2.5)), [1, ["a", 2.5]]),
    "inf": (float("inf"), ".inf"),
    "minus_inf": (float("-inf"), "-.inf"),
    "nan": (float("nan"), ".nan"),
    "nothing_here": (None, None),
    "unsigned": (2**63 + 5, 2**63 + 5),
    "huge": (2**70, str(2**70)),
    "complex": (1 + 2j, "(1+2j)"),
    "class": (torch.nn.ReLU, "torch.nn.modules.activation.ReLU"),
    "function": (torch.nn.functional.gelu, None),
    "partial": (functools.partial(torch.optim.SGD, lr=0.1), None),
    "text": ("Grüße, 世界 \U0001f600", "Grüße, 世界 \U0001f600"),
    "bytes": (b"\x00\xff", None),
    "array": (numpy.arange(3), None),
    "delta": (datetime.timedelta(seconds=3), None),
    "range": (range(3), None),
}


class OddNet(interop.Net):
    def __init__(self, hidden=16, **odd):
        super().__init__(hidden)
        self.hparams.clear()
        self.save_hyperparameters()


def main(folder):
    case = {"optimizers": [["AdamW", {"lr": 0.01}]]}
    interop.Net.case = case
    module = OddNet(hidden=16, **{name: value for name, (value, _) in ODD.items()})
    interop.trainer_of(case, folder).fit(module, datamodule=interop.Data())
    saved = torch.load(interop.saved(folder, 1), weights_only=False)["hyper_parameters"]
    assert list(ODD) == [k for k in saved if k in ODD], list(saved)
    json.dump({name: plain for name, (_, plain) in ODD.items()}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
