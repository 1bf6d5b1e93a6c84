"""What a GPU can do at most, and how much of it kernels of a kind reach: for choices that nobody has measured."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Efficiency(NamedTuple):
    """Shares of their roofs that kernels reach in public measurements.

    cuBLAS' bf16 products of the sizes of a training step: about 85 % of the rate that an H100 sustains; Triton's with
    wgmma: about 65 % (its own tutorial and public benchmarks of it on H100s); kernels that wait for memory: 90 %.
    """

    cublas: float = 1.0
    triton: float = 1.0
    memory: float = 1.0


PURE = Efficiency()
"""The roofs themselves."""
HONEST = Efficiency(cublas=0.85, triton=0.65, memory=0.90)

LAUNCH = 3e-6
"""Seconds that one more kernel costs a stream: the last programs of one, and the first loads of the next."""


class Roofs(NamedTuple):
    """Bytes and FLOPs a second: ceilings measured on an A100 and an H100, the data sheet of a B200."""

    bandwidth: float
    low: float
    full: float
    """Of float32 without TF32, outside the tensor cores."""

    def flops(self, dtype: torch.dtype) -> float:
        return self.full if dtype == torch.float32 else self.low


ROOFS = {80: Roofs(1.75e12, 312e12, 19.5e12), 90: Roofs(3.0e12, 798e12, 67e12), 100: Roofs(8.0e12, 2250e12, 75e12)}


def roofs_of(sm: int) -> Roofs:
    """Of the newest known architecture that is not newer than ``sm``; of sm_80 for older ones."""
    return ROOFS[max((known for known in ROOFS if known <= sm), default=80)]
