"""Learning rates, and whatever else follows the optimiser step, as pure functions of it: nothing to store."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

SCHEDULES = ("cosine", "step", "multistep", "constant")


def scale_lr(lr: float, global_batch_size: int, lr_batch: float | None) -> float:
    """A learning rate given per ``lr_batch`` images, scaled to the global batch; 0 or None: as it is."""
    return lr * global_batch_size / lr_batch if lr_batch else lr


def check_decay(schedule: str, milestones: Sequence[int], period: float | None, name: str = "milestones") -> None:
    """The schedule has what it needs, in epochs or in steps, and its milestones rise.

    Args:
        schedule: A key of :data:`SCHEDULES`.
        milestones: Of "multistep".
        period: Between two decays of "step".
        name: What the config calls the milestones.

    Raises:
        ValueError: Names the key and what to write.
    """
    if schedule == "multistep" and not milestones:
        raise ValueError("optim.milestones=[]: the multistep schedule needs at least one epoch, for example [700]")
    if schedule == "step" and not period:
        shown = "null" if period is None else period
        raise ValueError(
            f"optim.decay_epochs={shown}: the step schedule needs at least one step between two decays, "
            "for example 30 epochs"
        )
    rising = sorted(set(milestones))
    if list(milestones) != rising:
        raise ValueError(f"optim.{name}={list(milestones)}: must rise; use {rising}")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate of every optimiser step, warm-up included.

    ``schedule(k)`` is the rate of update k, counted from 0. During the first ``warmup_steps`` values the rate
    rises linearly from ``warmup_lr`` to ``base_lr``; then the named decay applies, with the step counted from
    the start of the run:

    - ``cosine``: half a cosine from ``base_lr`` to ``min_lr`` over all steps (microsoft/SimMIM, warm-up
      overlaps its beginning), or over the steps after warm-up with ``cosine_after_warmup``
      (microsoft/Swin-Transformer);
    - ``multistep``: times ``gamma`` from each milestone on (the milestone's own step included);
    - ``step``: times ``gamma`` every ``decay_steps``;
    - ``constant``.

    With ``warmup_inclusive`` the last warm-up step has ``base_lr`` already (DINO, iBOT, BEiT).

    ``lag=True`` reproduces the references, whose scheduler runs after the optimiser: step k uses the value of
    step max(k - 1, 0).
    """

    name: str
    base_lr: float
    total_steps: int
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    warmup_steps: int = 0
    milestones: Sequence[int] = ()
    decay_steps: int = 0
    gamma: float = 0.1
    cosine_after_warmup: bool = True
    warmup_inclusive: bool = False
    lag: bool = False

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise ValueError(f"optim.schedule={self.name!r}: unknown; use one of {', '.join(SCHEDULES)}")
        check_decay(self.name, self.milestones, self.decay_steps)
        if self.name == "multistep" and self.warmup_steps > self.milestones[0]:
            raise ValueError(
                f"optim.milestones: the first, step {self.milestones[0]}, lies inside the warm-up of "
                f"{self.warmup_steps} step{'s' * (self.warmup_steps != 1)}; shorten the warm-up"
            )

    def __call__(self, step: int) -> float:
        """Learning rate of update ``step`` (from 0)."""
        return self.value(max(step - 1, 0) if self.lag else step)

    def value(self, step: int) -> float:
        """The formula at ``step``, without the lag."""
        if step < self.warmup_steps:
            length = max(self.warmup_steps - self.warmup_inclusive, 1)
            return self.warmup_lr + step * (self.base_lr - self.warmup_lr) / length
        if self.name == "cosine":
            return self._cosine(step)
        if self.name == "multistep":
            return self.base_lr * self.gamma ** bisect.bisect_right(self.milestones, step)
        if self.name == "step":
            return self.base_lr * self.gamma ** (step // self.decay_steps)
        return self.base_lr

    def floor(self, step: int) -> float:
        """What a peak of 0 would leave at update ``step``: start of the warm-up and end of the decay, in their shares.

        The rate is affine in the peak, so that of a peak scaled by s is floor + s·(rate − floor).
        """
        return replace(self, base_lr=0.0)(step)

    def _cosine(self, step: int) -> float:
        start = self.warmup_steps if self.cosine_after_warmup else 0
        length = self.total_steps - start
        if step - start >= length:
            return self.min_lr
        shape = 0.5 * (1 + math.cos(math.pi * (step - start) / length))
        return self.min_lr + (self.base_lr - self.min_lr) * shape
