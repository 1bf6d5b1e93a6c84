"""One optimiser step: the loop that training, profiling and benchmarks run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from fastmim.engine.base import Engine, Paced, Phase, unmarked
from fastmim.engine.stream import inputs_of


def train_step(
    engine: Engine,
    batches: Iterator[tuple[int, Any]],
    *,
    lr: float,
    lr_floor: float = 0.0,
    weight_decay: float | None = None,
    seed: int,
    total: int,
    steps_per_epoch: int,
    phase: Phase = unmarked,
    stops: Callable[[], bool] = lambda: False,
) -> bool:
    """Take the micro-batches of one update, and update.

    Args:
        engine: of an objective with ``random_mask`` and ``set_micro_batch``; its ``steps`` tells which step this is.
        batches: (epoch, micro-batch with ``images`` (B, C, H, W) and ``sample_ids`` (B,)), on the device.
        lr: learning rate of the update.
        lr_floor: of groups that scale the schedule's peak only, see :meth:`.Engine.set_lr`.
        weight_decay: of the update, where it follows a schedule.
        seed: of the masks.
        total, steps_per_epoch: length of the run and of an epoch in updates, for the objective's schedules.
        phase: marks what the host is doing.
        stops: asked between two micro-batches whether to end here; then the update does not happen.

    Returns:
        Whether the update was done.

    Raises:
        NonFiniteError: the update met a non-finite gradient, where the engine looks at once.
    """
    objective: Any = engine.objective
    if isinstance(objective, Paced):
        objective.set_step(engine.steps, total, steps_per_epoch)
    engine.set_lr(lr, lr_floor)
    if weight_decay is not None:
        engine.set_weight_decay(weight_decay)
    engine.begin_step()
    for micro in range(engine.grad_accum_steps):
        if micro and stops():
            return False
        objective.set_micro_batch(micro, engine.grad_accum_steps)
        with phase("data"):
            epoch, batch = next(batches)
        images, mask = inputs_of(objective, batch, seed=seed, epoch=epoch)
        engine.train_on(images, mask, phase)
    return True
