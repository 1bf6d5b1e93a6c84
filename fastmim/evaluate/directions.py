"""Optimisers of many classifiers at once: each gives a direction, and every classifier goes along it at its own rate.

A rate for each classifier is what torch's own optimisers, whose groups are of whole tensors, do not have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Momentum:
    """SGD with momentum (torch's, without dampening).

    Args:
        shapes_like: the parameters, (S, D, R, C) weights and (S, 1, R, C) biases of S × R classifiers.
        weight_decay: coupled: added to the gradient.
    """

    def __init__(self, shapes_like: Sequence[Tensor], weight_decay: float, momentum: float = 0.9) -> None:
        self.weight_decay, self.momentum = weight_decay, momentum
        self.speed = [torch.zeros_like(param) for param in shapes_like]

    def __call__(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        """What is subtracted, times the rate."""
        for speed, param, grad in zip(self.speed, params, grads, strict=True):
            speed.mul_(self.momentum).add_(self.scaled(param, grad + self.weight_decay * param))
        return self.speed

    def scaled(self, param: Tensor, grad: Tensor) -> Tensor:
        return grad


class Lars(Momentum):
    """LARS (You et al. 2017) as MAE and MoCo v3 have it: a matrix's gradient gets the length ``trust`` times the
    matrix's; what is of one dimension is left as it is."""

    def __init__(self, *args: Any, trust: float = 0.001, **options: Any) -> None:
        super().__init__(*args, **options)
        self.trust = trust

    def scaled(self, param: Tensor, grad: Tensor) -> Tensor:
        if param.shape[1] == 1:  # biases
            return grad
        own, length = (x.pow(2).sum((1, 3), keepdim=True).sqrt() for x in (param, grad))
        usable = (own > 0) & (length > 0)
        return grad * torch.where(usable, self.trust * own / length.where(usable, 1.0), 1.0)


class AdamW:
    """torch's, with its default averages and decoupled decay."""

    def __init__(self, shapes_like: Sequence[Tensor], weight_decay: float) -> None:
        self.weight_decay, self.steps = weight_decay, 0
        self.first = [torch.zeros_like(param) for param in shapes_like]
        self.second = [torch.zeros_like(param) for param in shapes_like]

    def __call__(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        self.steps += 1
        found = []
        for first, second, param, grad in zip(self.first, self.second, params, grads, strict=True):
            first.lerp_(grad, 0.1)
            second.mul_(0.999).addcmul_(grad, grad, value=0.001)
            root = (second / (1 - 0.999**self.steps)).sqrt_().add_(1e-8)
            found.append(first / (1 - 0.9**self.steps) / root + self.weight_decay * param)
        return found


DIRECTIONS: Mapping[str, Callable[..., Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]]] = {
    "sgd": Momentum,
    "lars": Lars,
    "adamw": AdamW,
}
"""By the names that protocols use."""
