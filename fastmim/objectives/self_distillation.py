"""What self-distillation needs beside its networks: centres of the teacher's logits, temperatures, the loss."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Centre(nn.Module):
    """Moving average of the teacher's mean logits (Caron et al. 2021, equation 4), moved once an update.

    Forward passes add up; :meth:`move` reduces over ranks and moves, so that accumulation and ranks give the centre
    of the whole batch.

    Args:
        shape: Of the buffer ``value``, with K elements.
        momentum: Share of the old centre that stays.
    """

    value: Tensor
    total: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...], momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(shape, device="cpu"))
        self.register_buffer("total", torch.zeros(math.prod(shape), device="cpu"), persistent=False)
        self.register_buffer("count", torch.zeros((), device="cpu"), persistent=False)

    @torch.no_grad()
    def add(self, total: Tensor, count: int) -> None:
        """Count a (K,) sum of ``count`` rows of logits."""
        self.total.add_(total)
        self.count.add_(count)

    @torch.no_grad()
    def move(self) -> None:
        """Take what was added since the last call, on every rank."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            both = torch.cat([self.total, self.count[None]])
            dist.all_reduce(both)
            self.total.copy_(both[:-1])
            self.count.copy_(both[-1])
        mean = (self.total / self.count).view_as(self.value).to(self.value.dtype)
        self.value.mul_(self.momentum).add_(mean, alpha=1 - self.momentum)
        self.forget()

    def forget(self) -> None:
        """Drop what was added since the last move."""
        self.total.zero_()
        self.count.zero_()


def warm_temperature(epoch: int, *, start: float, end: float, warm_up: int, delay: int = 0) -> float:
    """From ``start`` linearly to ``end`` over ``warm_up`` epochs, both included, ``delay`` epochs late."""
    reached = min(max(epoch - delay, 0), max(warm_up - 1, 0))
    return end if epoch - delay >= warm_up else start + (end - start) * reached / max(warm_up - 1, 1)


def sharpened(logits: Tensor, centre: Tensor, temperature: Tensor) -> Tensor:
    """The teacher's distribution, softmax((t − c)/τ) in float32 (or float64)."""
    return torch.softmax((_full(logits) - centre.flatten()) / temperature, dim=-1)


def cross_entropy(student: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Of each row: −Σ target · log softmax(s/τ); of ``target`` rows that sum to 1, or to a number of targets."""
    return -(target * torch.log_softmax(_full(student) / temperature, dim=-1)).sum(-1)


def _full(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
