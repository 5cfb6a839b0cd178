"""Prints torch optimizers half-way through a run, as JSON.

Cases are {"name", "config" (C++ options by name), "start", "grads" of each step, "half" (parameters
and state after half of the steps), "end"}. Parameters are in two groups but for LBFGS, which takes one,
and Adagrad, which LibTorch gives states at construction only; the last one never has a gradient.
"""

import json
import sys

import torch

torch.manual_seed(11)
STEPS = 8
SHAPES = [(3, 2), (4,), (2,)]


def plain(x):
    if isinstance(x, torch.Tensor):
        type_name = {torch.float32: "Float", torch.float64: "Double"}[x.dtype]
        return {"shape": list(x.shape), "type": type_name, "data": x.double().flatten().tolist()}
    if isinstance(x, dict):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    return x


def loss_of(params):
    return sum(((p - i - 1) ** 2).sum() + (p**4).sum() / 10 for i, p in enumerate(params[:2]))


cases = []


def add(name, **config):
    params = [torch.nn.Parameter(torch.randn(s)) for s in SHAPES]
    lbfgs = name == "LBFGS"
    one_group = name in ("LBFGS", "Adagrad")
    groups = [{"params": params}] if one_group else [{"params": params[:1]}, {"params": params[1:]}]
    opt = getattr(torch.optim, name)(groups, **config)
    case = {"name": name, "config": config, "start": plain(params), "grads": []}
    for step in range(STEPS):
        if step == STEPS // 2:
            case["half"] = {"params": plain(params), "state": plain(opt.state_dict())}
        if lbfgs:

            def closure():
                opt.zero_grad()
                loss = loss_of(params)
                loss.backward()
                return loss

            opt.step(closure)
            continue
        grads = [torch.randn(s) for s in SHAPES[:2]]
        case["grads"].append(plain(grads))
        for p, g in zip(params, grads):
            p.grad = g.clone()
        opt.step()
    case["end"] = plain(params)
    cases.append(case)


add("SGD", lr=0.1)
add("SGD", lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01)
add("SGD", momentum=0.9, nesterov=True)
add("Adam")
add("Adam", lr=0.01, betas=[0.8, 0.95], eps=1e-6, weight_decay=0.1, amsgrad=True)
add("AdamW")
add("AdamW", lr=0.01, amsgrad=True, weight_decay=0.2)
add("RMSprop")
add("RMSprop", lr=0.02, alpha=0.9, momentum=0.5, centered=True, weight_decay=0.1)
add("Adagrad")
add("Adagrad", lr=0.1, lr_decay=0.01, initial_accumulator_value=0.1, weight_decay=0.01)
add("LBFGS", lr=0.1, max_iter=2, history_size=3)
add("LBFGS", lr=0.5, max_iter=3, line_search_fn="strong_wolfe")

json.dump(cases, sys.stdout)
