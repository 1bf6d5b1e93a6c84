"""What comes after pretraining: k-NN votes, LARS."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from fastmim.evaluate.directions import Lars
from fastmim.evaluate.knn import knn_accuracy, knn_votes

from .common import Errors, relative


def downstream(meta: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], impl: str) -> Errors:
    """Those of its parts that are built."""
    errors: Errors = {}
    if any(name.startswith("knn.") for name in tensors):
        errors |= knn({name.removeprefix("knn."): value for name, value in tensors.items() if name.startswith("knn.")})
    if any(name.startswith("lars.") for name in tensors):
        errors |= lars(meta["lars"], tensors)
    return errors


def knn(part: Mapping[str, torch.Tensor]) -> Errors:
    """Votes for every class and accuracies, of each k."""
    train, labels, test, truth = (part[name] for name in ("train", "train_labels", "test", "test_labels"))
    ks = sorted(int(name.removeprefix("votes")) for name in part if name.startswith("votes"))
    classes = part[f"votes{ks[0]}"].shape[1]
    tables = [votes for _, votes in knn_votes(train, labels, test, classes=classes, neighbours=ks)]
    accuracy = knn_accuracy(train, labels, test, truth, classes=classes, neighbours=ks)
    errors: Errors = {}
    for k in ks:
        errors[f"{k}-NN votes"] = (relative(torch.cat([votes[k] for votes in tables]), part[f"votes{k}"]), 1e-5)
        errors[f"{k}-NN accuracy"] = (relative(accuracy[k], part[f"top{k}"]), 1e-6)
    return errors


def lars(said: str, tensors: Mapping[str, torch.Tensor]) -> Errors:
    """A weight and a bias after steps with given gradients."""
    numbers = {name: float(value) for name, value in re.findall(r"(\w+)=([\d.e-]+)", said)}
    weight, bias = tensors["lars.weight"].T[None, :, None].clone(), tensors["lars.bias"][None, None, None].clone()
    direction = Lars([weight, bias], numbers["weight_decay"], numbers["momentum"], trust=numbers["trust_coefficient"])
    for of_weight, of_bias in zip(tensors["lars.grads_weight"], tensors["lars.grads_bias"], strict=True):
        steps = direction([weight, bias], [of_weight.T[None, :, None], of_bias[None, None, None]])
        for param, step in zip((weight, bias), steps, strict=True):
            param.sub_(numbers["lr"] * step)
    return {
        "LARS weight": (relative(weight[0, :, 0].T, tensors["lars.weight_end"]), 1e-5),
        "LARS bias": (relative(bias[0, 0, 0], tensors["lars.bias_end"]), 1e-5),
    }
