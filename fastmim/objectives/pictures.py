"""Pictures of what an objective predicts, as columns of RGB images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .masks import pixel_mask

RECONSTRUCTION = ("image", "masked", "prediction", "composite")
GREY = 0.5


class Picture(NamedTuple):
    """Columns of (B, 3, H, W) float images in [0, 1] on the CPU under their headings; one row a sample."""

    headings: Sequence[str]
    columns: Sequence[Tensor]


def to_rgb(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 3, H, W): grey is repeated, two channels get an empty third, more are cut."""
    channels = images.shape[1]
    if channels == 1:
        return images.expand(-1, 3, -1, -1)
    if channels == 2:
        return F.pad(images, (0, 0, 0, 0, 0, 1))
    return images[:, :3]


def reconstruction(truth: Tensor, guess: Tensor, mask: Tensor) -> Picture:
    """The image, what the encoder sees of it, the prediction everywhere, and the image completed by it.

    Args:
        truth, guess: (B, C, H, W) in [0, 1].
        mask: (B, H/p, W/p), true = masked; these squares are grey, and are what the composite takes from ``guess``.
    """
    hidden = pixel_mask(mask, (truth.shape[-2], truth.shape[-1])).to(truth.device)
    pictures = [truth, truth.masked_fill(hidden, GREY), guess, torch.where(hidden, guess, truth)]
    return Picture(RECONSTRUCTION, [to_rgb(picture).cpu() for picture in pictures])


HEADS = 4
"""Heads that :func:`attention` shows each by itself."""


def attention(images: Tensor, weights: Tensor) -> Picture:
    """The image, dimmed where the mean over heads is small, and the same for the first heads by themselves.

    Args:
        images: (B, C, H, W) in [0, 1].
        weights: (B, heads, h, w), not negative; each map's largest value is shown in full.
    """
    shown, size = to_rgb(images), (images.shape[-2], images.shape[-1])
    maps = [weights.mean(1, keepdim=True)]
    maps += list(weights[:, :HEADS].split(1, 1)) if weights.shape[1] > 1 else []
    names = ["mean"] + [f"head {i}" for i in range(len(maps) - 1)]
    columns = [shown]
    for one in maps:
        scaled = one / one.amax((2, 3), keepdim=True).clamp(min=1e-12)
        columns.append(shown * F.interpolate(scaled, size=size, mode="nearest"))
    return Picture(("image", *names), [column.float().cpu() for column in columns])
