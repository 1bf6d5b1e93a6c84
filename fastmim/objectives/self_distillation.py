"""What self-distillation needs beside its networks: centres of the teacher's logits, temperatures, the loss."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmim_kernels.distillation.centre import centre_sum, moved_centre


class Teacher(nn.Module):
    """The moving average of encoder and head; no gradient reaches it."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.head: Any = head
        self.encoder.register_parameter("mask_token", None)  # it sees everything
        self.requires_grad_(False)

    @torch.no_grad()
    def follow(self, encoder: nn.Module, head: nn.Module) -> None:
        """Become equal to these."""
        for own, student in ((self.encoder, encoder), (self.head, head)):
            named = dict(student.named_parameters())
            for name, param in own.named_parameters():
                param.copy_(named[name])


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
    def add(self, logits: Tensor) -> None:
        """Count the rows of (…, K)."""
        total, count = centre_sum(logits)
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
        self.value.copy_(moved_centre(self.value, self.total, self.count, self.momentum))
        self.forget()

    def forget(self) -> None:
        """Drop what was added since the last move."""
        self.total.zero_()
        self.count.zero_()


def warm_temperature(epoch: int, *, start: float, end: float, warm_up: int, delay: int = 0) -> float:
    """From ``start`` linearly to ``end`` over ``warm_up`` epochs, both included, ``delay`` epochs late."""
    reached = min(max(epoch - delay, 0), max(warm_up - 1, 0))
    return end if epoch - delay >= warm_up else start + (end - start) * reached / max(warm_up - 1, 1)
