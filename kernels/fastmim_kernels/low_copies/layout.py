"""How the copies lie in their buffer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGN = 64
"""Values: every copy starts at a multiple of it."""


def padded(count: int) -> int:
    """Values that a copy of ``count`` takes."""
    return -(-count // ALIGN) * ALIGN


def total(tensors: Sequence[Tensor]) -> int:
    """Values of the buffer."""
    return sum([-(-t.numel() // ALIGN) for t in tensors]) * ALIGN


def views(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The copies in ``flat``, each in the shape of its tensor, by one call of torch: a step has more than a hundred."""
    spaced: list[Tensor] = []
    own = []
    for t in tensors:
        own.append(len(spaced))
        spaced.append(t)
        if gap := -t.numel() % ALIGN:
            spaced.append(flat[:gap])  # whose size alone is read
    found = torch._utils._unflatten_dense_tensors(flat, spaced)
    return [found[i] for i in own]
