"""Prints what torchmetrics makes of random batches, as JSON.

A list of {"metric", "options", "batches": [[first, second], ...], "batch_values", "value"}, where
"options" are those of the C++ metric of the same name, and a tensor is {"shape", "type", "data"}.
"""

import itertools
import json
import math
import sys
import warnings

import torch
import torchmetrics

warnings.simplefilter("ignore")
torch.manual_seed(7)
cases = []


def encode(x):
    if x is None:
        return None
    data = [None if isinstance(v, float) and math.isnan(v) else v for v in x.flatten().tolist()]
    return {"shape": list(x.shape), "type": "float" if x.is_floating_point() else "int", "data": data}


def add(name, options, batches, **python_only):
    kind = {"Mean": torchmetrics.MeanMetric}.get(name) or getattr(torchmetrics, name)
    metric = kind(**{**options, **python_only})
    values = [metric(*(x for x in batch if x is not None)) for batch in batches]
    cases.append(
        {
            "metric": name,
            "options": options,
            "batches": [[encode(x) for x in (*batch, None)[:2]] for batch in batches],
            "batch_values": [encode(v) for v in values],
            "value": encode(metric.compute()),
        }
    )


def with_ignored(target, index):
    if index is not None:
        target = torch.where(torch.rand(target.shape) < 0.2, index, target)
    return target


def binary(kind="prob", shape=(30,), ignore=None, n=3):
    result = []
    for _ in range(n):
        target = with_ignored(torch.randint(0, 2, shape), ignore)
        preds = {
            "prob": lambda: torch.rand(shape),
            "ties": lambda: (torch.rand(shape) * 8).round() / 8,
            "logits": lambda: torch.randn(shape) * 3,
            "labels": lambda: torch.randint(0, 2, shape),
        }[kind]()
        result.append((preds, target))
    return result


def multiclass(kind="prob", classes=6, n=3, extra=(), ignore=None, seen=None):
    result = []
    for _ in range(n):
        target = with_ignored(torch.randint(0, seen or classes, (40, *extra)), ignore)
        preds = {
            "prob": lambda: torch.rand(40, classes, *extra).softmax(1),
            "logits": lambda: torch.randn(40, classes, *extra) * 2,
            "labels": lambda: torch.randint(0, seen or classes, (40, *extra)),
        }[kind]()
        result.append((preds, target))
    return result


AVERAGES = ("micro", "macro", "weighted", "none")

for name in ("Accuracy", "F1Score"):
    for kind in ("prob", "logits", "labels"):
        add(name, {"task": "binary"}, binary(kind))
    add(name, {"task": "binary", "threshold": 0.3, "ignore_index": -1}, binary("prob", (8, 5), -1))
    add(name, {"task": "binary", "ignore_index": 0}, binary("prob", (30,)))
    add(name, {"task": "binary"}, [(torch.zeros(5), torch.zeros(5, dtype=torch.long))] * 2)
    for average, top_k, ignore in itertools.product(AVERAGES, (1, 3), (None, -1, 2, 255)):
        options = {"task": "multiclass", "num_classes": 6, "average": average, "top_k": top_k}
        if ignore is not None:
            options["ignore_index"] = ignore
        add(name, options, multiclass("prob" if top_k == 1 else "logits", ignore=ignore))
    for average in AVERAGES:
        options = {"task": "multiclass", "num_classes": 6, "average": average}
        add(name, options, multiclass("labels"))
        add(name, options, multiclass("logits", extra=(3, 2)))
        add(name, options, multiclass("labels", seen=3))  # classes 3, 4, 5 never occur
        options = {"task": "multilabel", "num_labels": 4, "average": average}
        add(name, options, binary("logits", (20, 4)))
        add(name, {**options, "ignore_index": -1}, binary("prob", (20, 4, 3), -1))
        add(name, {**options, "threshold": 0.7}, binary("prob", (20, 4)))
        add(name, {**options}, binary("labels", (20, 4)))
add(
    "F1Score",
    {"task": "multiclass", "num_classes": 6, "average": "none", "zero_division": 1},
    multiclass("labels", seen=3),
)

for normalize, ignore in itertools.product(("none", "true", "pred", "all"), (None, -1)):
    options = {"normalize": normalize, **({} if ignore is None else {"ignore_index": ignore})}
    python = {"normalize": None if normalize == "none" else normalize}
    add("ConfusionMatrix", {"task": "binary", **options}, binary("prob", (30,), ignore), **python)
    add(
        "ConfusionMatrix",
        {"task": "multiclass", "num_classes": 6, **options},
        multiclass("logits", ignore=ignore, extra=(2,), seen=4),
        **python,
    )
    add(
        "ConfusionMatrix",
        {"task": "multilabel", "num_labels": 4, **options},
        binary("logits", (20, 4, 3), ignore),
        **python,
    )

for thresholds in (None, 11, [0.1, 0.3, 0.5, 0.9]):
    options = {} if thresholds is None else {"thresholds": thresholds}
    for kind, ignore in itertools.product(("prob", "ties", "logits"), (None, -1)):
        more = {} if ignore is None else {"ignore_index": ignore}
        add("AUROC", {"task": "binary", **options, **more}, binary(kind, (60,), ignore))
    add("AUROC", {"task": "binary", "max_fpr": 0.3, **options}, binary("prob", (60,)))
    add("AUROC", {"task": "binary", **options}, [(torch.rand(9), torch.ones(9, dtype=torch.long))] * 2)
    for average in ("macro", "weighted", "none"):
        several = {"task": "multiclass", "num_classes": 6, "average": average, **options}
        add("AUROC", several, multiclass("prob"))
        add("AUROC", several, multiclass("logits", seen=4))  # two classes never occur
        add("AUROC", {**several, "ignore_index": -1}, multiclass("prob", extra=(3,), ignore=-1))
    for average in AVERAGES:
        several = {"task": "multilabel", "num_labels": 4, "average": average, **options}
        add("AUROC", several, binary("ties", (30, 4)))
        add("AUROC", {**several, "ignore_index": -1}, binary("logits", (30, 4, 2), -1))


def regression(shape, n=3):
    result = []
    for _ in range(n):
        target = torch.randn(shape) * 3 + 1
        result.append((target + torch.randn(shape), target))
    return result


for name in ("MeanSquaredError", "MeanAbsoluteError"):
    add(name, {}, regression((20,)))
    add(name, {}, regression((5, 4)))
    add(name, {"num_outputs": 3}, regression((10, 3)))
    add(name, {}, [(torch.randint(0, 9, (8,)), torch.randint(0, 9, (8,)))] * 2)
add("MeanSquaredError", {"squared": False}, regression((20,)))
add("MeanSquaredError", {"squared": False, "num_outputs": 2}, regression((20, 2)))
for multioutput, adjusted in itertools.product(
    ("raw_values", "uniform_average", "variance_weighted"), (0, 2, 19, 50)
):
    options = {"multioutput": multioutput, "adjusted": adjusted}
    add("R2Score", options, regression((20,)))
    add("R2Score", options, regression((20, 3)))
constant = torch.full((10,), 2.0)
add("R2Score", {}, [(constant + 1, constant), (constant, constant)])
add("R2Score", {"multioutput": "raw_values"}, regression((12, 1)))

add("Mean", {}, [(torch.randn(5), None), (torch.randn(2, 3), None), (torch.randn(()), None)])
add("Mean", {}, [(torch.randn(4, 3), torch.rand(4, 3)), (torch.randn(4, 3), torch.rand(3))])
add("Mean", {}, [(torch.tensor(2.0), torch.tensor(3.0)), (torch.tensor(5.0), torch.tensor(1.0))])
add("Mean", {}, [(torch.arange(7), None)])
holes = torch.tensor([1.0, float("nan"), 3.0])
weights = torch.tensor([1.0, 2.0, 5.0])
for strategy in ("warn", "ignore", 4.0):
    add("Mean", {"nan_strategy": strategy}, [(holes.clone(), weights.clone()), (holes.clone(), None)])

json.dump(cases, sys.stdout)
