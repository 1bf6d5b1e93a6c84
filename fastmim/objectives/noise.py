"""Gumbel noise that is a pure function of a row's key: no generator, so a restart and other ranks draw the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# 32-bit integers, which wrap alike everywhere: murmur3's finaliser (Appleby 2011) and the golden ratio's step.
_GAMMA, _MIX1, _MIX2 = -0x61C88647, -0x7A143595, -0x3D4D51CB


@torch.no_grad()
def gumbel(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard Gumbel noise, -log(-log u) with u uniform in (0, 1) in steps of 2⁻²³.

    Both halves of a key count, one before and one within the mixing: two rows whose counters overlap still differ.

    Args:
        keys: (B,) int64, of :func:`~fastmim.objectives.keys.crop_keys`.
        shape: Of a row.

    Returns:
        (B, *shape) float32 on the device of ``keys``.
    """
    low, high = keys.contiguous().view(torch.int32).view(-1, 2, 1).unbind(1)
    count = torch.Size(shape).numel()
    x = torch.arange(count, dtype=torch.int32, device=keys.device) * _GAMMA + low
    _xor_shifted(x, 16).mul_(_MIX1)
    _xor_shifted(x, 13).bitwise_xor_(high).mul_(_MIX2)
    _xor_shifted(x, 16)
    u = x.bitwise_right_shift_(9).bitwise_and_(0x7FFFFF).float().add_(0.5).mul_(2.0**-23)
    return u.log_().neg_().log_().neg_().view(-1, *shape)


def _xor_shifted(x: Tensor, bits: int) -> Tensor:
    # Integers have only the arithmetic shift: clear the copies of the sign bit.
    return x.bitwise_xor_((x >> bits).bitwise_and_((1 << (32 - bits)) - 1))
