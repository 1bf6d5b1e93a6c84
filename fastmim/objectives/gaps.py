"""Images of which some samples are not there: NaN marks no data, in a band of a pixel.

An encoder gets the mean for them (0, of normalised images); statistics and losses are those of the others alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmim_kernels.local_norm.on_torch import EPS


def filled(images: Tensor) -> Tensor:
    """The images with 0 where there is no data."""
    return images.masked_fill(images.isnan(), 0)


def valid_moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of the valid ones of (…, n) values, both (…, 1).

    Of none both are 0, and of one the variance.
    """
    valid = ~values.isnan()
    count = valid.sum(-1, keepdim=True)
    mean = filled(values).sum(-1, keepdim=True) / count.clamp(min=1)
    squares = filled(values - mean).square().sum(-1, keepdim=True)
    return mean, squares / (count - 1).clamp(min=1)


def window_statistics(images: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Mean and √(unbiased variance + 1e-6) of the valid pixels around each pixel, per band.

    What :func:`~fastmim_kernels.local_norm.op.local_statistics` gives where all are valid. Of no pixel the mean is 0,
    and of none or one the variance.

    Args:
        images: (B, C, H, W) float.
        window: Odd edge of the window in pixels, of which those inside of the image count.

    Returns:
        Both (B, C, H, W).
    """
    pivot = images.nanmean((2, 3), keepdim=True).nan_to_num()  # squares of what is far from 0 would cancel
    x = filled(images - pivot)
    sums = torch.cat(((~images.isnan()).to(x.dtype), x, x.square()), 1) * window**2
    for kernel, pad in (((window, 1), (window // 2, 0)), ((1, window), (0, window // 2))):
        sums = F.avg_pool2d(sums, kernel, 1, pad)
    count, first, second = sums.chunk(3, 1)
    count = count.round()
    mean = first / count.clamp(min=1)
    variance = (second - count * mean.square()) / (count - 1).clamp(min=1)
    return mean + pivot * (count > 0), (variance.clamp(min=0) + EPS).sqrt()
