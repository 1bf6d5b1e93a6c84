"""The copies in torch: the path of CPUs, and of devices without Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import padded, total


def forward(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Arguments and result of the op ``fastmim::low_copies``."""
    flat = tensors[0].new_empty(total(tensors), dtype=dtype)
    end = 0
    for t in tensors:
        flat[end : end + t.numel()].copy_(t.reshape(-1))
        end += padded(t.numel())
    return flat
