"""The line of micro-batches from any step on, and how many of them make a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

from fastmim.objectives import Objective
from fastmim.objectives.views import Images


class Loads(Protocol):
    """What training needs of a loader; ``fastmim.data`` builds them."""

    steps_per_epoch: int

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Micro-batches of an epoch from index ``start`` on."""
        ...


def stream(loader: Loads, *, start: int, stop: int, grad_accum_steps: int) -> Iterator[tuple[int, Any]]:
    """Yield (epoch, micro-batch) for the optimiser steps ``start`` to ``stop - 1``, epoch after epoch."""
    step = start
    while step < stop:
        epoch, done = divmod(step, loader.steps_per_epoch)
        length = min(loader.steps_per_epoch - done, stop - step)
        batches = iter(loader.epoch(epoch, start=done * grad_accum_steps))
        for _ in range(length * grad_accum_steps):
            yield epoch, next(batches)
        step += length


def inputs_of(objective: Any, batch: Any, *, seed: int, epoch: int) -> tuple[Images, Tensor]:
    """(images, mask) that an objective takes for a loader's micro-batch.

    Args:
        objective: an :class:`Objective`, or any module with ``random_mask``.
        batch: ``sample_ids`` (B,), and ``images`` (B, C, H, W) or several ``views``, on the device.
        seed, epoch: of masks and colours.
    """
    images, ids = batch.views if hasattr(batch, "views") else batch.images, batch.sample_ids
    if isinstance(objective, Objective):
        return objective.inputs(images, ids, getattr(batch, "files", ids), seed=seed, epoch=epoch)
    return images, objective.random_mask(ids, seed=seed, epoch=epoch)


def micro_batch_that_fits(micro_batch_size: int, global_batch_size: int, world_size: int) -> int:
    """The largest micro-batch, no larger than that given, of which a whole number makes the global batch; or 0."""
    each, rest = divmod(global_batch_size, world_size)
    return 0 if rest else max(n for n in range(1, micro_batch_size + 1) if each % n == 0)


def batch_sizes(
    *, micro_batch_size: int, grad_accum_steps: int, global_batch_size: int | None, world_size: int
) -> tuple[int, int]:
    """(micro-batches per step, images per step over all ranks); a wanted global batch decides the first.

    Raises:
        ValueError: the wanted global batch is not a whole number of micro-batches.
    """
    at_once = micro_batch_size * world_size
    if global_batch_size is None:
        return grad_accum_steps, at_once * grad_accum_steps
    accum, rest = divmod(global_batch_size, at_once)
    if rest:
        smaller = micro_batch_that_fits(micro_batch_size, global_batch_size, world_size)
        fix = f"train.micro_batch_size={smaller}, or train.global_batch_size=" if smaller else ""
        raise ValueError(
            f"train.global_batch_size={global_batch_size}: not a multiple of {at_once} (micro_batch_size "
            f"{micro_batch_size} on {world_size} ranks); use {fix}{max(accum, 1) * at_once}"
        )
    if grad_accum_steps not in (1, accum):
        raise ValueError(
            f"train.grad_accum_steps={grad_accum_steps}: global_batch_size={global_batch_size} needs "
            f"{accum}; leave it out"
        )
    return accum, global_batch_size
