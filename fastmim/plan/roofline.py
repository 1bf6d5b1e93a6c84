"""Modelled time of a step. Nothing here was measured on a GPU: every figure made of it is to be called modelled.

- A launch takes what the roof of three allows that binds it: its bytes and its FLOPs at the efficiency of public
  kernels (``fastmim_kernels.common.roofs.HONEST``), and the issue slots of a Triton kernel's machine code; and
  :data:`.LAUNCH` for its beginning and end. Launches do not overlap. The pure roof beside it knows bytes and FLOPs
  alone, at 100 % of both.
- The host takes :data:`HOST_LAUNCH` for each; a phase takes as long as the slower one of GPU and host.
- A ring moves (n - 1) / n of the bytes of a reduce-scatter or an all-gather over a GPU's link, twice that for an
  all-reduce (Patarasuk and Yuan 2009), with the network's bandwidth where more than one machine takes part, at
  :data:`LINK` of it and with :func:`latency` for each message.
- Reductions of gradients overlap with backward, but for the last bucket of them, which is all where one bucket holds
  all gradients. The gather of updated weights of stages 1 and 2 overlaps with nothing.
- ZeRO-3 fetches the weights of each module as it comes, in every phase of every micro-batch: the host takes
  :data:`FETCH` for each, and :data:`SHOWN` of the traffic is not hidden.
- Inputs of recomputed blocks that are kept in host memory cross PCIe twice a micro-batch, beside no compute.
- Offloaded optimiser states are updated on the host, at its memory bandwidth, after their gradients came over PCIe.

Stragglers, waits for images, clocks under load and allocator stalls are in none of these: :data:`BAND` is the share of
the modelled speed that is left of it in the worst case that a plan reckons with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fastmim_kernels.common.roofs import HONEST, LAUNCH, PURE, Efficiency

from .hardware import Gpu
from .trace import Footprint

GPUS_PER_MACHINE = 8
PCIE = 25e9
HOST_BANDWIDTH = 20e9
"""Bytes/s of a process's share of its machine's memory, for the update of offloaded states."""
UPDATE = 28
TEACHER = 12
"""Bytes a parameter that a fused AdamW moves: gradient, weight and two moments read, the last three written."""
CLIP = 12
"""Bytes a float32 gradient: read for the norm, read and written to be scaled."""
HOST_LAUNCH = 30e-6
"""Seconds of Python and dispatcher for a launch of forward or backward (``benchmarks/bench_host.py``)."""
LINK = 0.8
"""Share of a link's bandwidth that collectives of large messages reach (public runs of nccl-tests)."""
FETCH = 200e-6
"""Seconds that DeepSpeed's hooks take around a module whose weights ZeRO-3 fetches and releases."""
SHOWN = 0.3
"""Share of ZeRO-3's traffic that its prefetch hides behind nothing."""
DDP_BUCKET = 25e6
"""Bytes of gradients that DistributedDataParallel reduces at once."""
BAND = 0.6


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step.

    Attributes:
        compute, update, exposed: Forward and backward, the optimiser, communication that nothing hides.
        pure: All of it if every launch reached the pure roof.
        bound: Seconds of ``compute`` by what binds: "bytes", "FLOPs", "issue" slots, "launches" and the "host".
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
    bucket: int = 500_000_000,
) -> StepTime:
    """Modelled time of ``grad_accum_steps`` micro-batches and an update.

    Args:
        gathers: How often ZeRO-3 gathers all weights in a micro-batch: forward and backward, and once more
            where whole blocks are recomputed.
        bucket: Elements that stages 1 to 3 reduce at once.
    """
    accum = grad_accum_steps
    copies = accum * 2 * footprint.host(micro_batch) / PCIE
    fetched = footprint.modules if stage == 3 and gpus > 1 else 0
    found = zip(footprint.bound(gpu, micro_batch), footprint.launches, (1, gathers - 1), strict=True)
    phases = [_with_host(roofs, launches, times * fetched) for roofs, launches, times in found]

    def parts(forward: float, backward: float, efficiency: Efficiency) -> tuple[float, float, float]:
        # A teacher's update is TEACHER / UPDATE of one of as many weights.
        moved = (footprint.trained + TEACHER / UPDATE * footprint.averaged) / (gpus if stage else 1)
        update = _update(moved, gpu, stage, offload, efficiency)
        exposed = _exposed(footprint, gpu, stage, gpus, accum, forward, backward, gathers, bucket)
        return accum * (forward + backward), update, exposed + copies

    times = parts(sum(phases[0].values()), sum(phases[1].values()), HONEST)
    pure = parts(*footprint.seconds(gpu, micro_batch), PURE)
    bound = {roof: accum * (phases[0][roof] + phases[1][roof]) for roof in phases[0]}
    return StepTime(*times, sum(pure), bound)


def _with_host(roofs: Mapping[str, float], launches: int, fetched: int) -> dict[str, float]:
    """Seconds of a phase by what binds, with what its launches cost and by how much the host is slower."""
    gpu = sum(roofs.values()) + launches * LAUNCH
    host = launches * HOST_LAUNCH + fetched * FETCH
    return {**roofs, "launches": launches * LAUNCH, "host": max(host - gpu, 0.0)}


def _update(parameters: float, gpu: Gpu, stage: int, offload: str, efficiency: Efficiency) -> float:
    if offload in ("optimizer", "all"):
        return parameters * (4 / PCIE + UPDATE / HOST_BANDWIDTH)
    return parameters * (UPDATE + (CLIP if stage == 0 else CLIP / 2)) / gpu.bandwidth / efficiency.memory


def latency(gpus: int) -> float:
    """Seconds of a collective of next to no bytes: within a machine, and over the hops between several."""
    return 25e-6 + 10e-6 * math.log2(max(gpus / GPUS_PER_MACHINE, 1))


def _exposed(
    footprint: Footprint,
    gpu: Gpu,
    stage: int,
    gpus: int,
    accum: int,
    forward: float,
    backward: float,
    gathers: int,
    bucket: int,
) -> float:
    """Seconds of communication that nothing hides, of an optimiser step."""
    if gpus == 1:
        return 0.0
    bandwidth = LINK * (gpu.link if gpus <= GPUS_PER_MACHINE else min(gpu.link, gpu.network))
    parameters = footprint.trained

    def all_of(size: float, messages: int, count: float = parameters) -> float:
        return size * count * (gpus - 1) / gpus / bandwidth + messages * latency(gpus)

    if stage == 0:
        # float32 gradients, all-reduced under the last backward
        messages = math.ceil(4 * parameters / DDP_BUCKET)
        return _beside(backward, all_of(8, messages), messages)
    messages = math.ceil(parameters / bucket)
    if stage < 3:
        reduced = accum if stage == 2 else 1
        publish = all_of(2, messages, parameters + footprint.averaged)
        return reduced * _beside(backward, all_of(2, messages), messages) + publish
    fetch = all_of(2, footprint.modules, footprint.parameters)
    back = (gathers - 1) * fetch + all_of(2, messages)
    return accum * (max(fetch - forward, SHOWN * fetch) + max(back - backward, SHOWN * back))


def _beside(phase: float, traffic: float, messages: int) -> float:
    """What is left of traffic under a phase, at whose end the last message starts."""
    return max(traffic - phase, traffic / messages)
