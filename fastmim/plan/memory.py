"""Bytes on one GPU by component: states by formula, activations and workspace from a trace.

States of P parameters in two layouts (Rajbhandari et al. 2020, section 3.1, count the second with bfloat16 gradients):

- stage 0 is :class:`LocalEngine <fastmim.engine.local.LocalEngine>`: float32 weights 4P, gradients 4P and moments
  8P; autocast's bfloat16 copies of the weights are activations, because autograd keeps them.
- stages 1 to 3 are DeepSpeed's, see :data:`LAYOUTS`: low-precision weights, gradients, and a float32 copy of the
  weights with the two moments. Each stage divides one more of them by the number of GPUs: optimiser, gradients,
  weights.

A teacher has weights as the student has them, no gradients and no moments. At stage 0 these are its moving average; at
the others they are a copy of it, and the average, 4 bytes a weight, is cut and offloaded like the moments.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from .trace import Footprint

STAGES = (0, 1, 2, 3)
OFFLOADS = ("none", "optimizer", "param", "all")
LAYOUTS = {"bf16": (2, 4, 12), "fp16": (2, 2, 12), "fp32": (4, 4, 12)}
"""Bytes a parameter of weights, gradients and optimiser under DeepSpeed: bf16 accumulates gradients in float32."""
LIBRARIES = 0.25e9
"""cuBLAS and NCCL buffers, bytes: constants of the libraries, not of the model."""


@dataclass(frozen=True)
class Buckets:
    """DeepSpeed's buffers, in elements (its defaults): gradients on their way, weights gathered ahead of use."""

    reduce: int = 500_000_000
    prefetch: int = 50_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the fullest point of a step, and what offloading puts into a process's RAM or on a drive."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    workspace: float
    buckets: float
    host: float = 0.0
    drive: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, name) for name in COMPONENTS)


COMPONENTS = tuple(f.name for f in fields(Memory) if f.name not in ("host", "drive"))


@dataclass(frozen=True)
class States:
    """Bytes of the states on one GPU, and of those moved to its host's RAM or to a drive."""

    weights: float
    gradients: float
    optimizer: float
    host: float = 0.0
    drive: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def states(
    parameters: int,
    stage: int,
    gpus: int,
    offload: str = "none",
    layout: tuple[int, int, int] = LAYOUTS["bf16"],
    nvme: str = "none",
    *,
    still: int = 0,
    averaged: int = 0,
) -> States:
    """Weights, gradients and optimiser states of one of ``gpus`` ranks.

    Args:
        parameters: Elements that are trained.
        stage: 0 to 3.
        gpus: Ranks that share what the stage divides.
        offload: What lives outside the GPU: "optimizer" (stages 1 to 3; with the rank's gradients from stage 2 on),
            "param" (the weights, stage 3), "all".
        layout: Bytes a parameter of weights, gradients and optimiser, for stages 1 to 3.
        nvme: What of it lives on a drive, in the same words; the rest is in host RAM.
        still: Further elements, without gradients.
        averaged: Of these those of which a moving average is kept.

    Raises:
        ValueError: The stage cannot offload that.
    """
    if offload in ("param", "all") and stage != 3:
        raise ValueError(f"efficiency.offload_param: needs efficiency.zero_stage=3, not {stage}; or use none")
    if offload == "optimizer" and stage == 0:
        raise ValueError("efficiency.offload_optimizer: needs efficiency.zero_stage 1, 2 or 3, not 0; or use none")
    assert offload in OFFLOADS, offload
    if stage == 0:
        return States(4.0 * (parameters + still), 4.0 * parameters, 8.0 * parameters)
    share = parameters / gpus
    weights = layout[0] * (parameters + still) / (gpus if stage == 3 else 1)
    gradients = layout[1] * (share if stage >= 2 else parameters)
    optimizer = layout[2] * share + 4.0 * averaged / gpus
    moved = {"optimizer": 0.0, "param": 0.0}
    if offload in ("optimizer", "all"):
        moved["optimizer"], optimizer = optimizer + 4.0 * share, 0.0
        gradients = gradients if stage == 1 else 0.0
    if offload in ("param", "all"):
        moved["param"], weights = weights, 0.0
    drive = sum(size for what, size in moved.items() if nvme in (what, "all"))
    return States(weights, gradients, optimizer, sum(moved.values()) - drive, drive)


def memory(
    footprint: Footprint,
    *,
    stage: int,
    gpus: int,
    micro_batch: int,
    grad_accum_steps: int,
    offload: str = "none",
    buckets: Buckets = Buckets(),  # noqa: B008  frozen
    layout: tuple[int, int, int] = LAYOUTS["bf16"],
    nvme: str = "none",
) -> Memory:
    """The fullest point of a training step on one GPU.

    Args:
        footprint: Traced with float32 weights for stage 0, with bfloat16 weights for the others.
        stage, gpus, offload, layout, nvme: See :func:`states`.
        micro_batch: Images in one forward and backward.
        grad_accum_steps: Micro-batches of an update. With one, stage 0 has no gradients before backward, and
            they take the place of activations that are freed.
        buckets: Buffers of stages 1 to 3.
    """
    untrained = {"still": footprint.parameters - footprint.trained, "averaged": footprint.averaged}
    held = states(footprint.trained, stage, gpus, offload, layout, nvme, **untrained)
    growing = stage == 0 and grad_accum_steps == 1
    moment = footprint.peak(micro_batch, accumulating=not growing)
    gradients = moment.gradients if growing else held.gradients
    extra = 0.0 if stage == 0 else 4.0 * min(buckets.reduce, footprint.trained)
    if stage == 3:
        extra += layout[0] * (min(buckets.prefetch, footprint.parameters) + 2 * footprint.largest_block)
    work = moment.workspace + LIBRARIES
    within = Memory(held.weights, gradients, held.optimizer, moment.activations, work, extra)
    fullest = max(within, _at_update(footprint, held, stage, gpus, offload, extra), key=lambda m: m.total)
    # The host's fullest point is the end of forward, whichever the GPU's is.
    return replace(fullest, host=held.host + footprint.host(micro_batch), drive=held.drive)


def _at_update(footprint: Footprint, held: States, stage: int, gpus: int, offload: str, buckets: float) -> Memory:
    """While the optimiser runs: all gradients, no activations; ZeRO makes a float32 copy of its share of them."""
    copy = 4.0 * footprint.trained / gpus if stage > 0 and offload in ("none", "param") else 0.0
    return Memory(held.weights, held.gradients, held.optimizer, 0.0, copy + LIBRARIES, buckets)
