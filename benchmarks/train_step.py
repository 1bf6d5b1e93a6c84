"""A training step in three calls, forward, backward and update, as references write it and as our engine takes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LR, WEIGHT_DECAY, CLIP = 1e-4, 0.05, 5.0


@dataclasses.dataclass
class Provider:
    """A training step in three calls; ``module(images, mask)["loss"]`` is its forward pass without precision."""

    name: str
    module: nn.Module
    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor], None]
    update: Callable[[], None]


def plain_step(
    name: str,
    module: nn.Module,
    call: Callable[..., Any],
    *,
    device: str,
    dtype: str,
    lr: float = LR,
    **adamw: Any,
) -> Provider:
    """The step as the references write it: autocast, backward, clipping, AdamW as torch builds it by default.

    Args:
        name: The provider's.
        module: The objective, whose parameters are updated.
        call: ``module``, or what wraps it (compiled, data-parallel).
        device, dtype: "cpu" or "cuda"; "fp32" or "bf16" (autocast).
        lr: Learning rate.
        adamw: More arguments of ``torch.optim.AdamW``.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=WEIGHT_DECAY, **adamw)

    def forward(images: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
            loss: Tensor = call(images, mask)["loss"]
            return loss

    def update() -> None:
        nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Provider(name, module, forward, lambda loss: loss.backward(), update)


def engine_step(name: str, objective: nn.Module, engine: Any) -> Provider:
    """The step of one of our engines over ``objective``."""
    return Provider(name, objective, lambda images, mask: engine(images, mask)["loss"], engine.backward, engine.step)


def awake(objective: nn.Module) -> nn.Module:
    """``objective`` with every residual branch at work: SwinV2 starts them at zero, where gradients prove nothing."""
    for key, parameter in objective.named_parameters():
        if key.endswith(("norm1.weight", "norm2.weight")):
            nn.init.constant_(parameter, 0.5)
    return objective
