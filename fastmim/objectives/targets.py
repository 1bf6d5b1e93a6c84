"""What is predicted."""

from __future__ import annotations

from torch import Tensor

import fastmim_kernels as fk
from fastmim_kernels.local_norm.op import local_statistics

_WIDEST = 65_535


def check_window(norm_target: int) -> None:
    """Off, or an odd window of at least two pixels, since one has no variance, and not wider than images can be.

    Raises:
        ValueError: Names the nearest windows.
    """
    if norm_target > _WIDEST:
        raise ValueError(f"norm_target={norm_target}: wider than any image, of at most {_WIDEST} pixels; use 47")
    if norm_target and (norm_target % 2 == 0 or norm_target < 3):
        nearest = dict.fromkeys((max(norm_target - 1, 3), max(norm_target + 1, 3)))
        raise ValueError(
            f"norm_target={norm_target}: must be 0 (off) or an odd window of at least 3 pixels; "
            f"use {' or '.join(map(str, nearest))}"
        )


def pixel_target(images: Tensor, norm_target: int, *, impl: str = "auto") -> Tensor:
    """Normalised images (B, C, H, W), each pixel by the statistics of the ``norm_target`` × ``norm_target`` around it.

    0 leaves them as they are (SimMIM, Xie et al. 2022); a window is SwinV2's target (Liu et al. 2022, section 4.1).
    """
    return fk.local_norm_target(images, norm_target, impl=impl) if norm_target else images


def undo_target(prediction: Tensor, images: Tensor, norm_target: int) -> Tensor:
    """A prediction of :func:`pixel_target` of ``images`` as an image, by the true local statistics."""
    if not norm_target:
        return prediction
    mean, std = local_statistics(images, norm_target)
    return prediction * std + mean
