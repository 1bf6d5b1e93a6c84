"""One launch of a step, and what the roofs of a GPU allow it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from fastmim_kernels.common.roofs import HONEST, PURE, Efficiency

from .hardware import Gpu


@dataclasses.dataclass
class Launch:
    """One kernel: an aten op outside a custom op, or what a custom op launches."""

    phase: str
    op: str
    site: str
    bytes: int
    flops: int
    shapes: str
    issued: float = 0.0
    """Warp instructions of a Triton kernel, as :mod:`fastmim_kernels.check.issue_slots` counts; 0: unknown."""

    def seconds(self, gpu: Gpu) -> float:
        """The pure roof of bytes and FLOPs."""
        return gpu.seconds(self.bytes, self.flops)

    def roofs(self, gpu: Gpu, efficiency: Efficiency = PURE) -> dict[str, float]:
        """Seconds that each roof allows: of "bytes", "FLOPs" and "issue" slots."""
        products = efficiency.triton if "triton." in self.op else efficiency.cublas
        return {
            "bytes": self.bytes / gpu.bandwidth / efficiency.memory,
            "FLOPs": self.flops / gpu.flops / products,
            "issue": self.issued / gpu.slots if gpu.slots else 0.0,
        }

    def bound(self, gpu: Gpu) -> tuple[str, float]:
        """The roof of the three that binds at public efficiency, and its seconds."""
        return max(self.roofs(gpu, HONEST).items(), key=lambda item: item[1])


def bound(launches: Iterable[Launch], gpu: Gpu) -> dict[str, float]:
    """Seconds of the launches that each of the three roofs binds, at public efficiency; together their honest time."""
    found = {"bytes": 0.0, "FLOPs": 0.0, "issue": 0.0}
    for launch in launches:
        roof, seconds = launch.bound(gpu)
        found[roof] += seconds
    return found
