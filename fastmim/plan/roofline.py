"""Modelled time of a step. Nothing here was measured: every figure made of it is to be called modelled.

- A launch takes what the roof of three allows that binds it: its bytes and its FLOPs at the efficiency of public
  kernels (``fastmim_kernels.common.roofs.HONEST``), and the issue slots of a Triton kernel's machine code. The pure
  roof beside it knows bytes and FLOPs alone, at 100 % of both. Launches do not overlap and cost no latency of their
  own.
- A ring moves (n - 1) / n of the bytes of a reduce-scatter or an all-gather over a GPU's link, twice that for an
  all-reduce (Patarasuk and Yuan 2009), with the network's bandwidth where more than one machine takes part.
- Reductions of gradients overlap with backward, ZeRO-3's gathers with the phase that needs them; what is longer
  than the compute beside it is added. The gather of updated weights of stages 1 and 2 overlaps with nothing.
- Inputs of recomputed blocks that are kept in host memory cross PCIe twice a micro-batch, beside no compute.
- Offloaded optimiser states are updated on the host, at its memory bandwidth, after their gradients came over PCIe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastmim_kernels.common.roofs import HONEST, PURE, Efficiency

from .hardware import Gpu
from .trace import Footprint

GPUS_PER_MACHINE = 8
PCIE = 25e9
HOST_BANDWIDTH = 20e9
"""Bytes/s of a process's share of its machine's memory, for the update of offloaded states."""
UPDATE = 28
"""Bytes a parameter that a fused AdamW moves: gradient, weight and two moments read, the last three written."""
CLIP = 12
"""Bytes a float32 gradient: read for the norm, read and written to be scaled."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step.

    Attributes:
        compute, update, exposed: Forward and backward, the optimiser, communication that nothing hides.
        pure: All of it if every launch reached the pure roof.
        bound: Seconds of ``compute`` by the roof that binds: "bytes", "FLOPs" and "issue" slots.
    """

    compute: float
    update: float
    exposed: float
    pure: float
    bound: Mapping[str, float]

    @property
    def total(self) -> float:
        return self.compute + self.update + self.exposed


def step_time(
    footprint: Footprint,
    gpu: Gpu,
    *,
    stage: int,
    gpus: int,
    micro_batch: int,
    grad_accum_steps: int,
    gathers: int = 2,
    offload: str = "none",
) -> StepTime:
    """Modelled time of ``grad_accum_steps`` micro-batches and an update.

    Args:
        gathers: How often ZeRO-3 gathers all weights in a micro-batch: forward and backward, and once more
            where whole blocks are recomputed.
    """
    copies = grad_accum_steps * 2 * footprint.host(micro_batch) / PCIE

    def parts(forward: float, backward: float, efficiency: Efficiency) -> tuple[float, float, float]:
        update = _update(footprint.parameters / (gpus if stage else 1), gpu, stage, offload, efficiency)
        exposed = _exposed(footprint.parameters, gpu, stage, gpus, grad_accum_steps, forward, backward, gathers)
        return grad_accum_steps * (forward + backward), update, exposed + copies

    bounds = footprint.bound(gpu, micro_batch)
    times = parts(sum(bounds[0].values()), sum(bounds[1].values()), HONEST)
    pure = parts(*footprint.seconds(gpu, micro_batch), PURE)
    bound = {roof: grad_accum_steps * (bounds[0][roof] + bounds[1][roof]) for roof in bounds[0]}
    return StepTime(*times, sum(pure), bound)


def _update(parameters: float, gpu: Gpu, stage: int, offload: str, efficiency: Efficiency) -> float:
    if offload in ("optimizer", "all"):
        return parameters * (4 / PCIE + UPDATE / HOST_BANDWIDTH)
    return parameters * (UPDATE + (CLIP if stage == 0 else CLIP / 2)) / gpu.bandwidth / efficiency.memory


def _exposed(
    parameters: int, gpu: Gpu, stage: int, gpus: int, accum: int, forward: float, backward: float, gathers: int
) -> float:
    bandwidth = gpu.link if gpus <= GPUS_PER_MACHINE else min(gpu.link, gpu.network)
    once = 2 * parameters * (gpus - 1) / gpus / bandwidth
    if stage == 0:
        # float32 gradients, all-reduced under the last backward
        return max(4 * once - backward, 0.0)
    if stage < 3:
        reduced = accum if stage == 2 else 1
        return reduced * max(once - backward, 0.0) + once
    return accum * (max(once - forward, 0.0) + max(gathers * once - backward, 0.0))
