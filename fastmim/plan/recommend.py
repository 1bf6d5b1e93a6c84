"""Every way to run a step on a machine, which of them fit, which is fastest, and what to buy where none does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .hardware import GIB, Gpu, in_precision
from .memory import LAYOUTS, Buckets, Memory, memory
from .roofline import StepTime, step_time
from .trace import Footprint

HEADROOM = 0.08
"""Share of a GPU's memory that a plan leaves free: fragmentation, and what a trace does not see."""
RECOMPUTE = ("none", "fc1", "gemm", "fc1_qkv", "full/2", "full")
"""Policies of every plan, from nothing that is computed again to all: ``efficiency.recompute``, ``/n`` for every n-th
block."""
MOST_IMAGES = 1024
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)
CLOSE = 0.01
LOWER_STAGE = 0.05
"""What a higher stage must gain to be taken: each adds collectives and parts that can fail."""


@dataclass(frozen=True)
class Setting:
    """How a step is run."""

    stage: int
    policy: str
    micro_batch: int
    grad_accum_steps: int
    gpus: int
    offload: str = "none"

    @property
    def images(self) -> int:
        """Of an optimiser step over all GPUs."""
        return self.micro_batch * self.grad_accum_steps * self.gpus


@dataclass(frozen=True)
class Option:
    """A setting on a machine, with its modelled memory and time."""

    setting: Setting
    memory: Memory
    time: StepTime
    limit: float
    mfu: float

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.limit

    @property
    def images_per_sec(self) -> float:
        return self.setting.images / self.time.total


@dataclass(frozen=True)
class Model:
    """The traced objective: a footprint by (policy, weights are DeepSpeed's), traced when first asked for."""

    trace: Callable[[str, bool], Footprint]
    policies: Sequence[str]
    buckets: Buckets = Buckets()
    layout: tuple[int, int, int] = LAYOUTS["bf16"]
    nvme: str = "none"
    least_stage: int = 0
    """1 for fp16: the loss scaling that it needs is that of DeepSpeed's cut optimiser states."""

    def option(self, gpu: Gpu, setting: Setting) -> Option:
        """Memory and time of one setting."""
        footprint = self.trace(setting.policy, setting.stage > 0)
        s = setting
        need = memory(
            footprint,
            stage=s.stage,
            gpus=s.gpus,
            micro_batch=s.micro_batch,
            grad_accum_steps=s.grad_accum_steps,
            offload=s.offload,
            buckets=self.buckets,
            layout=self.layout,
            nvme=self.nvme,
        )
        time = step_time(
            footprint,
            gpu,
            stage=s.stage,
            gpus=s.gpus,
            micro_batch=s.micro_batch,
            grad_accum_steps=s.grad_accum_steps,
            gathers=3 if s.policy.startswith("full") else 2,
            offload=s.offload,
            bucket=self.buckets.reduce,
        )
        # The useful work is that of a step in which nothing is computed twice.
        useful = self.trace(self.policies[0], s.stage > 0).flops(s.micro_batch) * s.grad_accum_steps
        limit = gpu.memory * GIB * (1 - HEADROOM)
        return Option(s, need, time, limit, useful / time.total / gpu.flops)


def stages_for(gpus: int, offload: str, least: int = 0) -> tuple[int, ...]:
    """ZeRO stages that make sense: one GPU has nothing to share, offloading needs a stage that can."""
    if offload in ("param", "all"):
        return (3,)
    if offload == "optimizer":
        return (1, 2, 3) if gpus > 1 else (2,)
    return tuple(range(least, 4)) if gpus > 1 else (least,)


def micro_batches(global_batch: int, gpus: int) -> list[int]:
    """Micro-batches of which a whole number makes a global batch on so many GPUs.

    Raises:
        ValueError: the GPUs do not divide the global batch.
    """
    each, rest = divmod(global_batch, gpus)
    if rest or not each:
        near = max(each, 1) * gpus
        raise ValueError(
            f"--gpus {gpus}: does not divide the global batch of {global_batch}; use another number, "
            f"or train.global_batch_size={near}"
        )
    return [n for n in range(1, min(each, MOST_IMAGES) + 1) if each % n == 0]


def options(model: Model, gpu: Gpu, gpus: int, global_batch: int, offload: str = "none") -> list[Option]:
    """For each stage and policy the fastest micro-batch that fits, or the smallest one where none does."""
    sizes = micro_batches(global_batch, gpus)
    found = []
    for stage in stages_for(gpus, offload, model.least_stage):
        for policy in model.policies:
            settings = [Setting(stage, policy, n, global_batch // gpus // n, gpus, offload) for n in sizes]
            tried = [model.option(gpu, setting) for setting in settings]
            fitting = [option for option in tried if option.fits]
            found.append(best(fitting) if fitting else tried[0])
    return found


def best(fitting: Iterable[Option]) -> Option:
    """The lowest stage within 5 % of the fastest; of its options within 1 % of its fastest, that which computes least
    again, and then that of least memory."""
    fitting = list(fitting)
    near = _close(fitting, LOWER_STAGE)
    lowest = min(option.setting.stage for option in near)
    close = _close([option for option in near if option.setting.stage == lowest], CLOSE)
    return min(close, key=lambda option: (_again(option.setting.policy), option.memory.total))


def _again(policy: str) -> int:
    return RECOMPUTE.index(policy) if policy in RECOMPUTE else len(RECOMPUTE)


def _close(found: Sequence[Option], share: float) -> list[Option]:
    fastest = max(option.images_per_sec for option in found)
    return [option for option in found if option.images_per_sec >= (1 - share) * fastest]


def smallest_machine(
    model: Model,
    setting: Setting | None,
    global_batch: int,
    offload: str = "none",
    known: Mapping[str, Gpu] | None = None,
) -> tuple[Gpu, Option] | None:
    """The known GPU and the count, least memory in all, on which it fits.

    Args:
        setting: Its policy, micro-batch and stage are kept (stage 0 may become another where there are several
            GPUs); None: the fastest way that fits.
        known: The GPUs to choose from; None: those with bf16.
    """
    known = in_precision("bf16") if known is None else known
    machines = [(gpu, n) for gpu in known.values() for n in COUNTS if global_batch % n == 0]
    for gpu, count in sorted(machines, key=lambda m: (m[0].memory * m[1], m[1])):
        tried = _on(model, gpu, count, setting, global_batch, offload)
        if any(option.fits for option in tried):
            found = options(model, gpu, count, global_batch, offload) if setting is None else tried
            return gpu, best(option for option in found if option.fits)
    return None


def _on(model: Model, gpu: Gpu, count: int, setting: Setting | None, global_batch: int, offload: str) -> list[Option]:
    """The setting on a machine; without one every stage and policy at a micro-batch of one image."""
    micro = setting.micro_batch if setting else 1
    accum, rest = divmod(global_batch, micro * count)
    if rest or not accum:
        return []
    policies = [setting.policy] if setting else model.policies
    stages = stages_for(count, offload, model.least_stage)
    if setting is not None and setting.stage > 0:
        stages = (setting.stage,)
    return [model.option(gpu, Setting(s, p, micro, accum, count, offload)) for s in stages for p in policies]
