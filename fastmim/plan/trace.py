"""One micro-batch of the real objective on fake tensors: what it keeps, when, and what it launches.

Nothing is executed and no memory is used. The ops choose their implementation as on a GPU, autocast casts as it
does there, and what stays alive is what autograd and the recomputation policy really keep. Two batch sizes are
traced; every byte and FLOP count is linear in the batch, so that they give any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from fastmim.engine import recompute
from fastmim.engine.dry_step import autocast_of, built
from fastmim_kernels.common.caches import forget_caches
from fastmim_kernels.common.dispatch import as_on_a_gpu

from .counter import DispatchCounter
from .hardware import Gpu
from .launch import Launch, bound
from .live import LiveBytes

BATCHES = (16, 32)
LOW = torch.bfloat16


@dataclass(frozen=True)
class Trace:
    """A traced micro-batch of ``batch`` images; ``others`` and ``grads`` are bytes alive at each op.

    ``others`` holds everything but weights, uint8 inputs and their gradients; ``kept`` is it at the end of forward.
    """

    batch: int
    parameters: int
    launches: tuple[Launch, ...]
    others: tuple[int, ...]
    grads: tuple[int, ...]
    kept: int
    largest_block: int
    """Parameters of the largest block, which ZeRO-3 gathers at once."""
    host: int = 0
    """Bytes of recomputed blocks' inputs that forward moves to the CPU's memory; no part of ``kept``."""
    modules: int = 1
    """Modules with parameters of their own, which ZeRO-3 fetches one by one."""
    still: int = 0
    """Of the parameters those that have no gradients: teachers, and what is never trained."""
    averaged: int = 0
    """Of these the ones that follow a trained one as its moving average."""
    frozen: int = 0
    """Bytes of weights that nothing trains, and of buffers, which every rank holds whole."""


def trace(
    build: Callable[[], Any],
    batches: Sequence[int] = BATCHES,
    *,
    precision: str = "bf16",
    low_weights: bool = False,
    on_gpu: bool = True,
) -> list[Trace]:
    """Forward and backward of ``build()(images, mask)["loss"]``, once for each batch size.

    Args:
        build: Makes the objective; called under a ``FakeTensorMode``.
        batches: Numbers of images.
        precision: "bf16" (autocast as on CUDA) or "fp32".
        low_weights: The weights themselves are bfloat16, as DeepSpeed keeps them.
        on_gpu: Ops choose their implementation as on a CUDA device; False: as on a CPU.
    """
    where: AbstractContextManager[Any] = as_on_a_gpu() if on_gpu else nullcontext()
    forget_caches()
    try:
        with FakeTensorMode(), where:
            objective = built(build, LOW if low_weights else None)
            return [_traced(objective, batch, precision) for batch in batches]
    finally:
        forget_caches()


def _traced(objective: Any, batch: int, precision: str) -> Trace:
    parameters = list(objective.parameters())
    images, mask = objective.example(batch)
    frozen = list(objective.frozen_tensors())
    given = tree_leaves(images)
    # As much as the normalised copy of uint8 images, which the trace counts.
    floats = sum(tensor.nbytes for tensor in given if tensor.is_floating_point())
    live = LiveBytes([*parameters, *objective.buffers(), *frozen, *given, mask])
    counter = DispatchCounter(objective.shares(), live=live)
    with counter, _moves_to_the_host() as moved:
        with autocast_of(precision):
            loss = objective(images, mask)["loss"]
        kept, host = live.now + floats, sum(moved)
        counter.phase = "backward"
        loss.backward()
    others, grads = live.history(p.grad for p in parameters if p.grad is not None)
    objective.zero_grad(set_to_none=True)
    count, largest = sum(p.numel() for p in parameters), _largest_block(objective)
    modules = sum(any(True for _ in module.parameters(recurse=False)) for module in objective.modules())
    held = sum(tensor.nbytes for tensor in [*frozen, *objective.buffers()])
    history = tuple(counter.launches), tuple(size + floats for size in others), tuple(grads)
    return Trace(batch, count, *history, kept, largest, host, modules, *_untrained(objective), held)


def _untrained(objective: Any) -> tuple[int, int]:
    """Parameters without gradients, and of these the teachers' whose students are trained."""
    still = sum(p.numel() for p in objective.parameters() if not p.requires_grad)
    pairs = [(teacher, dict(student.named_parameters())) for teacher, student in objective.ema()]
    follows = [p for teacher, own in pairs for name, p in teacher.named_parameters() if own[name].requires_grad]
    return still, sum(p.numel() for p in follows)


@contextmanager
def _moves_to_the_host() -> Iterator[list[int]]:
    """Inside, what recomputation offloads leaves the trace and comes back as a new tensor; yields bytes of each."""
    moved: list[int] = []

    def pack(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
        moved.append(tensor.numel() * tensor.element_size())
        return tensor.shape, tensor.dtype

    def unpack(packed: tuple[torch.Size, torch.dtype]) -> Tensor:
        return torch.empty(packed[0], dtype=packed[1])

    # Fake tensors are on the CPU, where save_on_cpu would keep them as they are.
    with mock.patch.object(recompute, "save_on_cpu", lambda pin_memory: saved_tensors_hooks(pack, unpack)):
        yield moved


def _largest_block(objective: nn.Module) -> int:
    """Parameters of the largest block of the encoder: of a module in a list that holds no list itself."""
    blocks = [
        module
        for holder in objective.modules()
        if isinstance(holder, nn.ModuleList)
        for module in holder
        if not any(isinstance(inner, nn.ModuleList) for inner in module.modules())
    ]
    return max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0)


@dataclass(frozen=True)
class Moment:
    """Bytes at the fullest point of a micro-batch."""

    gradients: float
    activations: float
    workspace: float

    @property
    def total(self) -> float:
        return self.gradients + self.activations + self.workspace


class Footprint:
    """Memory and work of a micro-batch of any size, from traces of two."""

    def __init__(self, small: Trace, large: Trace) -> None:
        # A step whose sequence of ops depended on the batch could not be extrapolated.
        assert len(small.others) == len(large.others) and small.batch < large.batch
        self.small, self.large = small, large
        self.parameters, self.largest_block, self.modules = small.parameters, small.largest_block, small.modules
        self.trained, self.averaged = small.parameters - small.still, small.averaged
        self.frozen = small.frozen
        phases = [x.phase for x in small.launches]
        self.launches = phases.count("forward"), phases.count("backward")
        self._times: dict[tuple[Gpu, str], tuple[dict[str, float], dict[str, float]]] = {}
        self._flops = tuple(sum(x.flops for x in t.launches) for t in (small, large))
        self._others = np.array([small.others, large.others], dtype=np.float64)
        self._grads = np.array(small.grads, dtype=np.float64)

    def _share(self, batch: int) -> float:
        return (batch - self.small.batch) / (self.large.batch - self.small.batch)

    def _line(self, small: float, large: float, batch: int) -> float:
        return small + (large - small) * self._share(batch)

    def kept(self, batch: int) -> float:
        """Bytes of activations at the end of forward."""
        return self._line(self.small.kept, self.large.kept, batch)

    def host(self, batch: int) -> float:
        """Bytes that recomputation keeps in the CPU's memory at the end of forward."""
        return self._line(self.small.host, self.large.host, batch)

    def peak(self, batch: int, *, accumulating: bool) -> Moment:
        """The fullest point of forward and backward.

        Args:
            batch: Images of the micro-batch.
            accumulating: Gradients of earlier micro-batches are there from the start, or are kept elsewhere:
                only those of the current op count. Otherwise they grow while backward frees activations.
        """
        grads = self._grads if not accumulating else np.diff(self._grads, prepend=0.0)
        others = self._others[0] + (self._others[1] - self._others[0]) * self._share(batch)
        at = int(np.argmax(others + grads))
        kept = min(self.kept(batch), float(others[at]))
        passing = float(grads[at]) if accumulating else 0.0
        return Moment(float(grads[at]) - passing, kept, float(others[at]) - kept + passing)

    def seconds(self, gpu: Gpu, batch: int) -> tuple[float, float]:
        """Pure roof of (forward, backward): every launch free of latency, none overlapping."""
        return self._at(gpu, "forward", batch)["pure"], self._at(gpu, "backward", batch)["pure"]

    def bound(self, gpu: Gpu, batch: int) -> tuple[dict[str, float], dict[str, float]]:
        """(Forward, backward) at public efficiency: seconds of the launches that each of three roofs binds."""
        forward, backward = (self._at(gpu, phase, batch) for phase in ("forward", "backward"))
        del forward["pure"], backward["pure"]
        return forward, backward

    def _at(self, gpu: Gpu, phase: str, batch: int) -> dict[str, float]:
        if (gpu, phase) not in self._times:
            self._times[gpu, phase] = _times(self.small, gpu, phase), _times(self.large, gpu, phase)
        small, large = self._times[gpu, phase]
        return {name: max(self._line(small[name], large[name], batch), 0.0) for name in small}

    def flops(self, batch: int) -> float:
        """Of the matrix products of forward and backward."""
        small, large = self._flops
        return self._line(small, large, batch)


def _times(trace: Trace, gpu: Gpu, phase: str) -> dict[str, float]:
    launches = [x for x in trace.launches if x.phase == phase]
    return {"pure": sum(x.seconds(gpu) for x in launches), **bound(launches, gpu)}
