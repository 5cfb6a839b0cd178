"""Prints what torch's schedules make of the learning rates and momenta of two groups, as JSON.

Cases are {"name", "schedule" (C++ options by name), "optimizer", "lrs" and "momenta" before the
first and after each of 200 steps, "saved" (state and optimizer groups after 60 steps)}.
"""

import json
import math
import sys
import warnings

import torch
from torch.optim import lr_scheduler as sched

warnings.simplefilter("ignore")
STEPS, SAVED_AT = 200, 60
METRICS = [math.cos(i / 9) + 5 / (1 + i) for i in range(STEPS)]


def make_optimizer(kind):
    params = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.1, 0.037)]
    if kind == "SGD":
        return torch.optim.SGD(params, lr=0.1, momentum=0.9)
    return getattr(torch.optim, kind)(params, lr=0.1)


def plain(x):
    if isinstance(x, dict):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    if isinstance(x, float) and not math.isfinite(x):
        return "inf" if x > 0 else "-inf"
    return x


def momentum(group):
    return group["betas"][0] if "betas" in group else group.get("momentum", 0.0)


cases = []


def add(name, schedule, make, optimizer="SGD"):
    opt = make_optimizer(optimizer)
    s = make(opt)
    case = {"name": name, "schedule": schedule, "optimizer": optimizer, "lrs": [], "momenta": []}
    for i in range(STEPS + 1):
        if i > 0:
            opt.step()
            if isinstance(s, sched.ReduceLROnPlateau):
                s.step(METRICS[i - 1])
            else:
                s.step()
        case["lrs"].append([g["lr"] for g in opt.param_groups])
        case["momenta"].append([momentum(g) for g in opt.param_groups])
        assert case["lrs"][-1] == s.get_last_lr()
        if i == SAVED_AT:
            groups = [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
            case["saved"] = {"state": plain(s.state_dict()), "groups": plain(groups)}
    cases.append(case)


def by_name(name, optimizer="SGD", **options):
    def make(opt):
        return getattr(sched, name)(opt, **options)

    title = name + " " + json.dumps(options) + " " + optimizer
    add(title, {"class_path": name, "init_args": options}, make, optimizer)


by_name("StepLR", step_size=30)
by_name("StepLR", step_size=7, gamma=0.93, optimizer="AdamW")
by_name("MultiStepLR", milestones=[30, 80, 80, 150], gamma=0.3)
by_name("ConstantLR")
by_name("ConstantLR", factor=0.3, total_iters=90)
by_name("LinearLR")
by_name("LinearLR", start_factor=0.01, end_factor=0.6, total_iters=77)
by_name("ExponentialLR", gamma=0.97)
by_name("PolynomialLR")
by_name("PolynomialLR", total_iters=150, power=2.3)
by_name("CosineAnnealingLR", T_max=200)
by_name("CosineAnnealingLR", T_max=40, eta_min=0.001)
by_name("CosineAnnealingWarmRestarts", T_0=10)
by_name("CosineAnnealingWarmRestarts", T_0=11, T_mult=2, eta_min=1e-4, optimizer="Adam")
by_name("OneCycleLR", max_lr=0.3, total_steps=200)
by_name("OneCycleLR", max_lr=[0.3, 0.1], epochs=10, steps_per_epoch=25, three_phase=True, optimizer="AdamW")
by_name("OneCycleLR", max_lr=0.3, total_steps=210, anneal_strategy="linear", pct_start=0.4, optimizer="Adam")
by_name("OneCycleLR", max_lr=0.3, total_steps=200, cycle_momentum=False, optimizer="Adagrad")
by_name("OneCycleLR", max_lr=0.3, total_steps=200, base_momentum=[0.7, 0.8], optimizer="RMSprop")
by_name("CyclicLR", base_lr=0.01, max_lr=0.2, step_size_up=20)
by_name("CyclicLR", base_lr=[0.01, 0.02], max_lr=[0.2, 0.3], step_size_up=20, step_size_down=33,
        mode="triangular2", optimizer="AdamW")
by_name("CyclicLR", base_lr=0.01, max_lr=0.2, step_size_up=20, mode="exp_range", gamma=0.99,
        cycle_momentum=False)
by_name("ReduceLROnPlateau")
by_name("ReduceLROnPlateau", mode="max", factor=0.5, patience=3, cooldown=2)
by_name("ReduceLROnPlateau", patience=2, threshold=0.05, threshold_mode="abs", min_lr=[0.01, 0.02])
by_name("ReduceLROnPlateau", mode="max", patience=1, threshold=0.01, threshold_mode="abs", factor=0.8, eps=1e-3)


def part(name, **options):
    return {"class_path": name, "init_args": options}


def combined(name, parts, milestones=None, optimizer="SGD"):
    def make(opt):
        inner = [getattr(sched, p["class_path"])(opt, **p["init_args"]) for p in parts]
        if milestones is None:
            return sched.ChainedScheduler(inner)
        return sched.SequentialLR(opt, inner, milestones)

    args = {"schedulers": parts}
    if milestones is not None:
        args["milestones"] = milestones
    add(name + " " + json.dumps(args), part(name, **args), make, optimizer)


combined("SequentialLR", [part("LinearLR", start_factor=0.1, total_iters=20), part("CosineAnnealingLR", T_max=180)], [20])
combined("SequentialLR", [part("ConstantLR", factor=0.1, total_iters=20), part("ExponentialLR", gamma=0.9),
                          part("StepLR", step_size=10), part("MultiStepLR", milestones=[3, 5])], [20, 50, 100])
combined("SequentialLR", [part("CosineAnnealingWarmRestarts", T_0=10), part("PolynomialLR", total_iters=100)], [70])
combined("SequentialLR", [part("StepLR", step_size=10), part("CosineAnnealingWarmRestarts", T_0=10, T_mult=2)], [70])
combined("SequentialLR", [part("LinearLR"), part("OneCycleLR", max_lr=0.3, total_steps=190)], [10])
combined("ChainedScheduler", [part("ConstantLR", factor=0.1, total_iters=20), part("ExponentialLR", gamma=0.98)])


def warmup(opt):
    inner = [sched.LinearLR(opt, start_factor=1 / 25, total_iters=25), sched.CosineAnnealingLR(opt, T_max=175)]
    return sched.SequentialLR(opt, inner, [25])


add("WarmupLR then cosine", part("WarmupLR", warmup_steps=25, after=part("CosineAnnealingLR", T_max=175)), warmup)
add("WarmupLR then held", part("WarmupLR", warmup_steps=25, start_factor=0.2),
    lambda opt: sched.SequentialLR(opt, [sched.LinearLR(opt, start_factor=0.2, total_iters=25)], []))
add("LambdaLR", None, lambda opt: sched.LambdaLR(opt, [lambda e: 0.95**e, lambda e: 1 / (1 + e)]))
add("MultiplicativeLR", None, lambda opt: sched.MultiplicativeLR(opt, lambda e: 0.95 + 0.0001 * e))

json.dump({"metrics": METRICS, "saved_at": SAVED_AT, "cases": cases}, sys.stdout)
