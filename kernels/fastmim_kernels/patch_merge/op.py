"""Patch merging: four neighbouring tokens become one of 4C channels (Swin, section 3.1), normalised or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..common.arguments import check_norm, explained, floating, wrong
from ..common.define_op import Kept, define_op
from ..common.rows import statistics_dtype
from . import on_torch


@explained()
def patch_merge(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5,
                out_dtype: torch.dtype | None = None, impl: str = "auto") -> Tensor:
    """Gather 2×2 neighbourhoods, (B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, 4C), and normalise them where asked to.

    Channel order is (row, column) = (0, 0), (1, 0), (0, 1), (1, 1), as in Microsoft's weights. An odd edge is
    padded with zeros. The gathered map is never kept: backward reads x again, or nothing without a norm.

    Args:
        x: (B, H, W, C) floating point.
        weight, bias: (4C,) of a LayerNorm over the merged channels (Swin); None for none (SwinV2).
        eps: Of the LayerNorm.
        out_dtype: Of the result, which a matrix product reads. Default: autocast's where it is on, else that
            of x.
        impl: See :mod:`fastmim_kernels.common.dispatch`.

    Raises:
        ValueError: An argument is not what is said here.
    """
    _check(x, weight, bias)
    check_norm("patch_merge", eps, out_dtype=out_dtype)
    device = x.device.type
    if out_dtype is None:
        out_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return OP(x, weight, bias, eps, out_dtype, impl=impl)


def traffic(shape: tuple[int, int, int, int], *, norm: bool, itemsize: int = 2, out_itemsize: int = 2,
            param_itemsize: int = 4) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Least (bytes read, bytes written, FLOPs) of forward and of backward.

    Args:
        shape: (B, H, W, C) of x.
        norm: With LayerNorm.
        itemsize, out_itemsize, param_itemsize: Bytes of a value of x, of the result, of a parameter.
    """
    b, h, w, c = shape
    rows = b * ((h + 1) // 2) * ((w + 1) // 2)
    n, out = b * h * w * c * itemsize, rows * 4 * c * out_itemsize
    forward = (n + norm * 8 * c * param_itemsize, out + norm * 8 * rows, 0)
    return forward, (out + norm * (n + 8 * rows + 4 * c * param_itemsize), n + norm * 32 * c, 0)


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    op = "patch_merge"
    floating(op, x, weight, bias)
    if x.ndim != 4 or not x.shape[3]:
        raise wrong(op, "x", "(B, H, W, C)", x)
    width = (4 * x.shape[3],)
    if weight is None and bias is None:
        return
    if weight is None or weight.shape != width:
        raise wrong(op, "weight", f"{width} for x of {tuple(x.shape)} (weight and bias both, or both None)", weight)
    if bias is None or bias.shape != width:
        raise wrong(op, "bias", f"{width} for x of {tuple(x.shape)} (weight and bias both, or both None)", bias)


def _fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype, impl: str
          ) -> tuple[Tensor, Tensor, Tensor]:
    """(merged, mean, rstd); the statistics are empty without a norm."""
    b, h, w, c = x.shape
    out = x.new_empty((b, (h + 1) // 2, (w + 1) // 2, 4 * c), dtype=out_dtype)
    mean = x.new_empty(0 if weight is None else out.numel() // (4 * c), dtype=statistics_dtype(x.dtype))
    return out, mean, torch.empty_like(mean)


def _backward_fake(grad: Tensor, x: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor | None, height: int,
                   width: int, dtype: torch.dtype, impl: str) -> tuple[Tensor, Tensor]:
    """(d x in ``dtype``, (2, 4C) of d weight and d bias, empty without a norm)."""
    dx = grad.new_empty((grad.shape[0], height, width, grad.shape[-1] // 4), dtype=dtype)
    return dx, mean.new_empty((0,) if weight is None else (2, grad.shape[-1]))


def _save(inputs: Any, outputs: Any) -> Any:
    x, weight, bias, _, _, impl = inputs
    _, mean, rstd = outputs
    dtypes = [None if p is None else p.dtype for p in (weight, bias)]
    return (x if weight is not None else None, mean, rstd, weight), (dtypes, (x.shape[1], x.shape[2], x.dtype, impl))


def _gradients(backward: Callable, kept: Kept, grad: Tensor) -> tuple[Tensor | None, ...]:
    dtypes, settings = kept.settings
    dx, sums = backward(grad, *kept.tensors, *settings)
    return dx, *([s.to(dtype) for s, dtype in zip(sums, dtypes, strict=True)] if dtypes[0] is not None else ())


def _reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
               ) -> Tensor:
    if weight is None or bias is None:
        return reference.patch_merge(x).to(out_dtype)
    wide = torch.promote_types(x.dtype, weight.dtype)
    return reference.patch_merge_norm(x.to(wide), weight.to(wide), bias.to(wide), eps).to(out_dtype)


OP = define_op("patch_merge", on_torch, ".on_triton", reference=_reference, fake=_fake, backward_fake=_backward_fake,
               save=_save, gradients=_gradients)
