"""A training step on fake tensors: nothing is computed, and no memory is used."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import nn

from fastmim.engine.cuda_autocast import cuda_autocast

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By ``efficiency.precision``."""


def dry_step(build: Callable[[], Any], batch: int, *, precision: str, low_weights: bool = False) -> None:
    """Forward and backward of ``build()`` as on a GPU, within a ``FakeTensorMode`` that the caller has entered.

    Args:
        build: Makes the objective.
        batch: Images of the micro-batch.
        precision: Of :data:`DTYPES`; the low ones by autocast as on CUDA.
        low_weights: The weights themselves are in it, as DeepSpeed keeps them.
    """
    objective: Any = built(build, DTYPES[precision] if low_weights else None)
    images, mask = objective.example(batch)
    with autocast_of(precision):
        loss = objective(images, mask)["loss"]
    loss.backward()


def autocast_of(precision: str) -> AbstractContextManager[Any]:
    """As CUDA casts in ``precision``, for tensors on the CPU."""
    return nullcontext() if precision == "fp32" else cuda_autocast(DTYPES[precision])


def fake_values() -> AbstractContextManager[Any]:
    """Inside, models are built without values: the truncated normal looks at some, and a fake tensor has none."""
    return mock.patch.object(nn.init, "trunc_normal_", lambda tensor, **kwargs: tensor)


def built(build: Callable[[], Any], dtype: torch.dtype | None = None) -> nn.Module:
    """``build()`` in training mode, without values; with parameters in ``dtype`` where one is given."""
    with fake_values():
        objective = build().train()
    if dtype is not None:
        for parameter in objective.parameters():
            parameter.data = parameter.data.to(dtype)
    return objective
