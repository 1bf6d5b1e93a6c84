"""A training step on fake tensors: nothing is computed, and no memory is used."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import nn

from fastmim.engine.cuda_autocast import cuda_autocast

LOW = torch.bfloat16


def dry_step(build: Callable[[], Any], batch: int, *, precision: str, low_weights: bool = False) -> None:
    """Forward and backward of ``build()`` as on a GPU, within a ``FakeTensorMode`` that the caller has entered.

    Args:
        build: Makes the objective.
        batch: Images of the micro-batch.
        precision: "bf16" (autocast as on CUDA) or "fp32".
        low_weights: The weights themselves are bfloat16, as DeepSpeed keeps them.
    """
    objective: Any = built(build, low_weights)
    images, mask = objective.example(batch)
    with autocast_of(precision):
        loss = objective(images, mask)["loss"]
    loss.backward()


def autocast_of(precision: str) -> AbstractContextManager[Any]:
    """As CUDA casts in ``precision``, for tensors on the CPU."""
    return cuda_autocast(LOW) if precision == "bf16" else nullcontext()


def fake_values() -> AbstractContextManager[Any]:
    """Inside, models are built without values: the truncated normal looks at some, and a fake tensor has none."""
    return mock.patch.object(nn.init, "trunc_normal_", lambda tensor, **kwargs: tensor)


def built(build: Callable[[], Any], low_weights: bool) -> nn.Module:
    """``build()`` in training mode, without values."""
    with fake_values():
        objective = build().train()
    if low_weights:
        for parameter in objective.parameters():
            parameter.data = parameter.data.to(LOW)
    return objective
