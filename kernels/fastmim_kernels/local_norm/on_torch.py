"""The normalised target in torch, by products with banded matrices of 0 and 1.

A box filter is separable: two products give the sums of every window with a few hundred operations a pixel and
without the cancellation of a summed-area table.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6


def forward(images: Tensor, kernel_size: int) -> Tensor:
    """Arguments and result of the op ``fastmim::local_norm_target``."""
    centred, _ = centre(images)
    mean, var = moments(centred, kernel_size)
    return centred.sub_(mean).mul_(var.add_(EPS).rsqrt_()).contiguous()


def centre(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images minus the first pixel of each plane, and that pixel.

    The variance does not change, and of a flat plane nothing but exact zeros remains to be subtracted.
    """
    pivot = images[..., :1, :1]
    return images - pivot, pivot


def moments(images: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each pixel's window."""
    b, c, height, width = images.shape
    rows, cols = _band(height, kernel_size, images), _band(width, kernel_size, images)
    count = rows.sum(1)[:, None] * cols.sum(1)[None, :]
    # x and x² share each product: one tall one along the rows, one batched one along the columns.
    both = torch.stack((images, images.square())).reshape(-1, width) @ cols
    sums = (rows @ both.reshape(-1, height, width)).reshape(2, b, c, height, width).div_(count)
    mean, var = sums
    var.addcmul_(mean, mean, value=-1).mul_(count / (count - 1).clamp_(min=1)).clamp_(min=0)
    return mean, var


def _band(size: int, kernel_size: int, like: Tensor) -> Tensor:
    i = torch.arange(size, device=like.device)
    return ((i[:, None] - i[None, :]).abs() <= kernel_size // 2).to(like.dtype)
