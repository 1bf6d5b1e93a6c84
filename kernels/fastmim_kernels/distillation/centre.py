"""The teacher's centre: sums of a micro-batch in the forward pass, one step of the average once per optimiser step.

Pure functions without collectives. Sums and counts of micro-batches and of ranks are added before :func:`moved_centre`,
so that the centre with accumulation is that of the whole batch (DINO, equation 4).
"""

from __future__ import annotations

import math

from torch import Tensor

from ..common.rows import statistics_dtype


def centre_sum(logits: Tensor) -> tuple[Tensor, int]:
    """((K,) sum of all rows of (…, K), in float32 or better; their number)."""
    rows, width = logits.detach(), logits.shape[-1]
    return rows.reshape(-1, width).sum(0, dtype=statistics_dtype(rows.dtype)), math.prod(rows.shape[:-1])


def moved_centre(centre: Tensor, total: Tensor, count: int | Tensor, momentum: float | Tensor = 0.9) -> Tensor:
    """``momentum·c + (1 − momentum)·total / count`` in the shape and dtype of ``centre``; itself after 0 rows.

    Args:
        centre: K values in any shape.
        total: (K,) sum of rows over micro-batches and ranks.
        count: Their number; a tensor of one value where ranks have added theirs up.
        momentum: Of the average, 0.9 in DINO and iBOT.
    """
    mean = total.reshape(centre.shape) / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))
    moved = centre.to(mean.dtype).lerp(mean, 1 - momentum)
    if isinstance(count, Tensor):
        return moved.where(count > 0, centre).to(centre.dtype)
    return (moved if count else centre).to(centre.dtype)
