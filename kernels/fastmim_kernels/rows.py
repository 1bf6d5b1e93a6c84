"""What the ops on rows share: LayerNorm of any mix of dtypes, sums over rows, the dtype of statistics."""

from __future__ import annotations

import torch
from torch import Tensor


PIECE = 1 << 17
"""Elements: four maps of them in float32 fit a CPU core's second-level cache."""


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, but float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def column_sum(x: Tensor) -> Tensor:
    """(C,) sum over all but the last axis of x, accumulated in float32 or better.

    On a CPU the sum of many rows is two to four times faster as a product with ones.
    """
    x = x.reshape(-1, x.shape[-1])
    if x.device.type != "cpu" or x.shape[0] < 1024:
        return x.sum(0, dtype=statistics_dtype(x.dtype))
    return (x.new_ones(1, x.shape[0]) @ x)[0]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(LN(x), mean (rows,), rstd (rows,)) of (…, C); the statistics in :func:`statistics_dtype`.

    A CPU takes low-precision x with float32 parameters, one pass less; elsewhere x is widened.
    """
    wide = statistics_dtype(x.dtype)
    x = x if x.device.type == "cpu" else x.to(wide)
    y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight.to(wide), bias.to(wide), eps)
    return y, mean.flatten(), rstd.flatten()


def layer_norm_backward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
                        ) -> tuple[Tensor, Tensor]:
    """(d x in the dtype of x, (2, C) d weight and d bias in :func:`statistics_dtype`) of :func:`layer_norm`.

    Low precision is widened first: the mixed CPU kernel of torch adds the parameters' gradients up in
    bfloat16, which loses most of them over some thousand rows. On a CPU piece by piece, within its cache.
    """
    channels, wide = x.shape[-1], statistics_dtype(x.dtype)
    rows = x.numel() // channels
    weight = weight.to(wide)
    narrow = x.device.type == "cpu" and (x.dtype != wide or grad.dtype != wide)
    step = max(PIECE // channels, 1) if narrow and x.numel() > 2 * PIECE else rows
    dx, sums = torch.empty_like(x), torch.zeros((2, channels), dtype=wide, device=x.device)
    maps = (t.reshape(rows, -1).split(step) for t in (grad, x, mean, rstd, dx))
    for part_grad, part_x, part_mean, part_rstd, part_dx in zip(*maps, strict=True):
        found, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
            part_grad.to(wide), part_x.to(wide), weight.shape, part_mean, part_rstd, weight, weight,
            [True, True, True])
        sums[0] += d_weight
        sums[1] += d_bias
        if step == rows:
            return found.view(x.shape).to(x.dtype), sums
        part_dx.copy_(found)
    return dx, sums


def refuse_float64(op: str, x: Tensor) -> None:
    """The Triton kernels compute in float32.

    Raises:
        ValueError: x is float64.
    """
    if x.dtype == torch.float64:
        raise ValueError(f"{op}: impl='triton' computes in float32 and got float64; use impl='torch'")
