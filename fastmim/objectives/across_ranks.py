"""What a forward pass needs of the other ranks: the one collective inside a forward, for what cannot leave it.

Sums that are used after the update are reduced there (:meth:`~.base.Objective.after_step`). Two things are used at
once: the statistics of a BatchNorm over the global batch, and the keys that a query is compared with. Both go through
:func:`gather`, which is one operator: fake tensors, ``torch.compile``, recomputation and DDP's or ZeRO's hooks see a
call with one input and one result, and every rank makes the same calls in the same order, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def ranks(training: bool) -> tuple[int, int]:
    """(this rank, their number); (0, 1) where there is one, and outside training: ranks evaluate by themselves."""
    if training and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(x: Tensor, count: int) -> Tensor:
    """(…) of the same shape on each of ``count`` ranks → (count, …), in rank order, on all of them.

    The gradient of a rank's input is the sum over the ranks of the gradients of its part: with the mean that DDP and
    ZeRO take of the ranks' gradients, those of the mean of the ranks' losses.
    """
    return x[None] if count == 1 else torch.ops.fastmim.gather_ranks(x, count)


@torch.library.custom_op("fastmim::gather_ranks", mutates_args=())
def _gathered(x: Tensor, count: int) -> Tensor:
    parts = x.new_empty(count, *x.shape)
    dist.all_gather_into_tensor(parts.flatten(0, 1), x.contiguous())
    return parts


@torch.library.custom_op("fastmim::sum_own_part", mutates_args=())
def _own_sum(parts: Tensor) -> Tensor:
    # Small, and reduce-scatter is not there for every backend.
    total = parts.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total[dist.get_rank()].clone()


@_gathered.register_fake
def _(x: Tensor, count: int) -> Tensor:
    return x.new_empty(count, *x.shape)


@_own_sum.register_fake
def _(parts: Tensor) -> Tensor:
    return parts.new_empty(parts.shape[1:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _own_sum(grad), None


_gathered.register_autograd(_backward)
