"""Rows that the ranks have found, together."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def all_rows(own: Tensor) -> Tensor:
    """The rows (n, …) of every rank, as many as it has, in the order of the ranks; every rank calls it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return own
    counts = [torch.zeros(1, dtype=torch.int64, device=own.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(own)], device=own.device))
    filled = own.new_zeros(max(map(int, counts)), *own.shape[1:])
    filled[: len(own)] = own
    every = [torch.empty_like(filled) for _ in counts]
    dist.all_gather(every, filled)
    return torch.cat([rows[: int(count)] for rows, count in zip(every, counts, strict=True)])
