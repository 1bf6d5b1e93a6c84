"""``patch_merge`` in torch: the path of CPUs, and of devices without Triton."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.rows import layer_norm, layer_norm_backward, statistics_dtype


def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
            ) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results of the op ``fastmim::patch_merge``."""
    x = x.contiguous()
    if weight is None or bias is None:
        absent = x.new_empty(0, dtype=statistics_dtype(x.dtype))
        return gather(x, out_dtype), absent, absent.clone()
    out, mean, rstd = layer_norm(gather(x, x.dtype), weight, bias, eps)
    return out.to(out_dtype), mean, rstd


def backward(grad: Tensor, x: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor | None, height: int,
             width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Arguments and results of the op ``fastmim::patch_merge_backward``."""
    grad, sums = grad.contiguous(), mean.new_empty(0)
    if weight is not None and x is not None:
        grad, *of_norm = layer_norm_backward(grad, gather(x.contiguous(), dtype), mean, rstd, weight)
        sums = torch.stack(of_norm)
    return scatter(grad, height, width, dtype), sums


def gather(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A fresh (B, ⌈H/2⌉, ⌈W/2⌉, 4C) in ``dtype``; the cast costs no pass of its own."""
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2)) if x.shape[1] % 2 or x.shape[2] % 2 else x
    b, h, w, c = x.shape
    out = x.new_empty((b, h // 2, w // 2, 2, 2, c), dtype=dtype)
    return out.copy_(x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5)).flatten(3)


def scatter(merged: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`gather`."""
    b, h, w, c = merged.shape
    x = merged.new_empty((b, h, 2, w, 2, c // 4), dtype=dtype)
    x.copy_(merged.view(b, h, w, 2, 2, c // 4).permute(0, 1, 4, 2, 3, 5))
    return x.view(b, 2 * h, 2 * w, c // 4)[:, :height, :width].contiguous()
