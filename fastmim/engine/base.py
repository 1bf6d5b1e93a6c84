"""What every engine shares: counting micro-batches and steps, means of losses, the guard against bad numbers, state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fastmim.engine import distributed
from fastmim.engine.nonfinite import NonFiniteError, find_nonfinite
from fastmim.engine.unfinished import StepStart
from fastmim.objectives import Objective
from fastmim.objectives.views import Images

#: Entered around "data", "forward", "backward" and "update" of every micro-batch; "step" of a replayed one.
Phase = Callable[[str], AbstractContextManager[Any]]


def unmarked(name: str) -> AbstractContextManager[Any]:
    """A phase that nobody wants to know of."""
    return nullcontext()


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@runtime_checkable
class Paced(Protocol):
    """An objective that has something to do once an optimiser step. Optional: others are trained as they are."""

    def set_step(self, step: int, total: int, steps_per_epoch: int) -> None: ...
    def after_step(self) -> None: ...


def _pairs(objective: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Each parameter of a teacher with that of its student."""
    pairs = objective.ema() if isinstance(objective, Objective) else []
    named = [(teacher, dict(student.named_parameters())) for teacher, student in pairs]
    return [(param, own[name]) for teacher, own in named for name, param in teacher.named_parameters()]


class Engine(ABC):
    """Forward, backward and update of an objective: a module with ``forward(images, mask) -> {"loss": scalar, …}``.

    Call ``engine.train_on(images, mask)`` once per micro-batch, or ``engine(images, mask)``, ``engine.backward(loss)``
    and ``engine.step()``; the update happens on every ``grad_accum_steps``-th. Other scalars that the objective
    returns are averaged like the loss.
    """

    #: Every rank writes its share of a checkpoint, instead of rank 0 alone.
    sharded = False
    #: The objective as it is called: compiled, or wrapped by what averages gradients or gathers weights.
    _module: Any
    #: A backward pass may be run outside the engine.
    _free_backward = True

    def __init__(
        self, objective: nn.Module, optimizer: Any, *, grad_accum_steps: int, precision: str, device: torch.device
    ) -> None:
        self.objective, self.optimizer = objective, optimizer
        self.grad_accum_steps, self.precision, self.device = grad_accum_steps, precision, device
        self.steps = 0
        self._micro = 0
        self._step_start: StepStart | None = None
        self._paced = objective if isinstance(objective, Paced) else None
        self._averages = _pairs(objective)
        self._extras: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._sum("loss")
        self._grad_norm = torch.zeros((), device=device)
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    def _sum(self, name: str) -> Tensor:
        if name not in self._sums:
            self._sums[name] = torch.zeros((), dtype=torch.float64, device=self.device)
        return self._sums[name]

    @property
    def collective(self) -> bool:
        """Whether even a forward pass needs all ranks."""
        return False

    @property
    def at_boundary(self) -> bool:
        """True while the current micro-batch is the last one of its update."""
        return self._micro == self.grad_accum_steps - 1

    @property
    def _base(self) -> torch.optim.Optimizer:
        """The optimiser that holds the moments."""
        return self.optimizer

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that the forward pass runs in."""
        dtype = _DTYPES.get(self.precision)
        return torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    def set_lr(self, lr: float, floor: float = 0.0) -> None:
        """Learning rate of the next update; a group's ``lr_scale`` multiplies it.

        Args:
            lr: of a group of scale 1.
            floor: what remains of it at scale 0, for groups whose ``scale_peak_only`` is true.
        """
        for group in self._base.param_groups:
            rate = scaled_lr(group, lr, floor)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)  # where a captured step reads it
            else:
                group["lr"] = rate

    def set_weight_decay(self, weight_decay: float) -> None:
        """Weight decay of the next update, of the groups that decay."""
        for group in self._base.param_groups:
            if group["weight_decay"] or str(group.get("name")).startswith("decay"):
                group["weight_decay"] = weight_decay

    def train_on(self, images: Images, mask: Tensor, phase: Phase = unmarked) -> None:
        """One micro-batch: forward, backward and, with the last of an update, the update.

        Args:
            images, mask: As for a call.
            phase: marks what the host is doing.

        Raises:
            NonFiniteError: as :meth:`step`.
        """
        with phase("forward"):
            loss = self(images, mask)["loss"]
        with phase("backward"):
            self.backward(loss)
        with phase("update"):
            self.step()

    def __call__(self, images: Images, mask: Tensor) -> dict[str, Tensor]:
        """Forward of one micro-batch: images (B, C, H, W), mask (B, H/p, W/p) bool -> {"loss": scalar, …}."""
        with self._around_forward():
            out = self._module(images, mask)
        self._extras = {name: value.detach() for name, value in out.items() if name != "loss" and value.ndim == 0}
        return out

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch's loss, and its scalars for :meth:`read`."""
        value = loss.detach()
        # 0·inf = NaN: an infinite L1 loss has finite gradients (signs), which must not pass as a good step.
        # On finite losses the factor is exactly 1.
        self._backward(loss * (value * 0 + 1))
        for name, scalar in {"loss": value, **self._extras}.items():
            self._sum(name).add_(scalar)
        self._count += 1

    def step(self) -> None:
        """Count one micro-batch; after the last of an update apply it, and then the objective's ``after_step``.

        Raises:
            NonFiniteError: the update met a non-finite gradient, where the engine looks at once.
        """
        update = self.at_boundary
        self._micro = 0 if update else self._micro + 1
        self.steps += update
        if self._step(update):
            self._after_update()
        elif update and isinstance(self.objective, Objective):
            self.objective.skip_step()

    def begin_step(self) -> None:
        """Before the first micro-batch of an update that has several: :meth:`discard_step` will come back to here."""
        self._step_start = None
        if self.grad_accum_steps > 1:
            self._step_start = StepStart(self.objective, self._sums, self._count, self.device)

    def discard_step(self) -> None:
        """Forget the micro-batches of an unfinished update: what is saved next is the last finished one.

        For saving only: under ZeRO the gradients stay in DeepSpeed's buffers.
        """
        if self._micro and self._step_start is not None:
            self._step_start.restore(self._sums)
            self._count, self._micro = self._step_start.count, 0
            self._base.zero_grad(set_to_none=True)

    def _after_update(self) -> None:
        if self._averages:
            self._move_averages()
        if self._paced is not None:
            self._paced.after_step()

    @torch.no_grad()
    def _move_averages(self) -> None:
        """Every teacher's parameter becomes m·itself + (1 − m)·its student's; the weights are float32."""
        teachers, students = zip(*self._averages, strict=True)
        objective: Any = self.objective
        torch._foreach_lerp_(teachers, students, 1 - objective.ema_momentum())

    def read(self, keep: bool = False) -> dict[str, float]:
        """Means since the last call (over ranks too): ``loss`` and the objective's other scalars; and ``grad_norm``,
        the last gradient norm before clipping.

        The one host synchronisation of a logged step.

        Args:
            keep: look only: the next call's means are of these micro-batches too.

        Raises:
            NonFiniteError: some update since the last call met a non-finite gradient.
        """
        means, norm = self._over_ranks(max(self._count, 1))
        if not keep:
            for total in self._sums.values():
                total.zero_()
            self._count = 0
        return means | {"grad_norm": norm}

    def _over_ranks(self, count: int) -> tuple[dict[str, float], float]:
        """The sums divided by ``count``, as means over the ranks, and the last gradient norm."""
        names = sorted(self._sums)  # in one order on every rank
        means = distributed.all_reduce_mean(torch.stack([self._sums[name] for name in names]) / count)
        last = torch.stack([self._grad_norm.double().to(self.device), self._first_bad.double()])
        *values, norm, bad = torch.cat([means, last]).tolist()
        if bad >= 0:
            raise NonFiniteError(int(bad))
        return dict(zip(names, values, strict=True)), norm

    def diagnose(self, images: Tensor, mask: Tensor) -> str | None:
        """Name the first non-finite value of a micro-batch that :class:`NonFiniteError` was raised for."""
        return find_nonfinite(self.objective, images, mask, self.autocast(), backward=self._free_backward)

    def state(self) -> dict[str, Any]:
        """The small state beside weights and moments, as JSON values. Every rank calls it; waits for the device.

        Raises:
            NonFiniteError: some update since the last :meth:`read` met a non-finite gradient.
        """
        sums, _ = self._over_ranks(1)
        state: dict[str, Any] = {"step": self.steps, "loss_sum": sums.pop("loss"), "loss_count": self._count}
        return state | ({"extra_sums": sums} if sums else {})

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` returned."""
        self.steps, self._count = int(state["step"]), int(state["loss_count"])
        for name, value in {"loss": state["loss_sum"], **state.get("extra_sums", {})}.items():
            self._sum(name).fill_(value)

    def _around_forward(self) -> AbstractContextManager[Any]:
        """What the forward pass runs in."""
        return nullcontext()

    @abstractmethod
    def _backward(self, loss: Tensor) -> None: ...

    @abstractmethod
    def _step(self, update: bool) -> bool:
        """The end of a micro-batch; with ``update`` clip and update. Returns whether an update was applied."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write weights and optimiser moments into ``folder``."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read a checkpoint; every rank calls it.

        Raises:
            RuntimeError: a weight is missing, left over or has another shape.
        """


def scaled_lr(group: Mapping[str, Any], lr: float, floor: float) -> float:
    """Learning rate of an optimiser's group, see :meth:`Engine.set_lr`."""
    least = floor if group.get("scale_peak_only") else 0.0
    return least + (lr - least) * float(group.get("lr_scale", 1.0))
