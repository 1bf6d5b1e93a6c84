"""How the copies lie in their buffer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

ALIGN = 64
"""Values: every copy starts at a multiple of it."""


def padded(count: int) -> int:
    """Values that a copy of ``count`` takes."""
    return -(-count // ALIGN) * ALIGN


def total(tensors: Sequence[Tensor]) -> int:
    """Values of the buffer."""
    return sum(padded(t.numel()) for t in tensors)
