"""Pictures of what an objective predicts, as columns of RGB images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .gaps import valid_moments
from .masks import pixel_mask

COMPOSITE = "composite"
RECONSTRUCTION = ("image", "masked", "prediction", COMPOSITE)
GREY = 0.5
CHECKS = (1.0, 0.75)
"""The two greys of the board that shows through transparent pixels."""
CHECK_EDGE = 8
"""Edge of one of its squares in pixels of the image."""
NO_DATA = (1.0, 0.0, 1.0)
"""Colour of pixels without data, magenta."""


class Picture(NamedTuple):
    """Columns of (B, 3, H, W) float images in [0, 1] on the CPU under their headings; one row a sample."""

    headings: Sequence[str]
    columns: Sequence[Tensor]


def to_rgb(images: Tensor, bands: Sequence[int] | None = None) -> Tensor:
    """(B, C, H, W) in [0, 1] -> (B, 3, H, W).

    One channel is shown as grey, four as colours and alpha over a checkerboard; two get an empty third, and of five
    and more the first three are shown. NaN, no data in a channel that is shown, is :data:`NO_DATA`.

    Args:
        bands: Numbers from 1 on of the one or three channels to show instead.
    """
    if bands is not None:
        images = images[:, [band - 1 for band in bands]]
    channels = images.shape[1]
    if channels == 4:
        colours, alpha = images.split((3, 1), dim=1)
        return colours * alpha + checkerboard(images) * (1 - alpha)
    images = F.pad(images, (0, 0, 0, 0, 0, 1)) if channels == 2 else images[:, :3]
    missing = images.isnan().any(1, keepdim=True)
    nothing = torch.tensor(NO_DATA, dtype=images.dtype, device=images.device)
    return torch.where(missing, nothing[:, None, None], images)


def stretched(images: Tensor, bands: Sequence[int] | None = None, like: Tensor | None = None) -> Tensor:
    """Float images (B, C, H, W) -> (B, 3, H, W) in [0, 1]: of any unit, and none of their bands is alpha.

    In every image a band's mean is 0.5, and two standard deviations from it are 0 and 1; NaN, no data, counts for
    neither and is :data:`NO_DATA`.

    Args:
        bands: As of :func:`to_rgb`; default: the first three, or the first of fewer.
        like: Of the same shape, whose mean and deviation are taken; default: the images themselves.
    """
    mean, variance = valid_moments((images if like is None else like).flatten(2))
    spread = 4 * variance.sqrt().clamp(min=1e-6)
    shown = ((images - mean[..., None]) / spread[..., None] + 0.5).clamp(0, 1)
    return to_rgb(shown, bands or ((1, 2, 3) if images.shape[1] >= 3 else (1,)))


def check_bands(bands: Sequence[int] | None, in_chans: int) -> None:
    """Refuse other than one or three numbers of channels.

    Raises:
        ValueError: ``bands=…: what; fix``.
    """
    if bands is None:
        return
    if len(bands) not in (1, 3):
        raise ValueError(f"bands={list(bands)}: give one channel (grey) or three (colours), not {len(bands)}")
    if not all(1 <= band <= in_chans for band in bands):
        numbers = f"the {in_chans} channels are numbered from 1 to {in_chans}"
        known = numbers if in_chans > 1 else "there is one channel, number 1"
        raise ValueError(f"bands={list(bands)}: {known}")


def checkerboard(images: Tensor) -> Tensor:
    """(H, W) board under ``images``, (…, H, W): squares of :data:`CHECK_EDGE` pixels, the first of them light."""
    rows, columns = (torch.arange(edge, device=images.device) // CHECK_EDGE for edge in images.shape[-2:])
    light, dark = CHECKS
    return torch.where((rows[:, None] + columns) % 2 == 0, light, dark)


def reconstruction(truth: Tensor, guess: Tensor, mask: Tensor, scored: Tensor | None = None) -> Picture:
    """The image, what the encoder sees of it, the prediction where it is scored, and the image completed by it.

    Args:
        truth, guess: (B, 3, H, W) in [0, 1], of :func:`to_rgb`.
        mask: (B, H/p, W/p), true = masked; these squares are grey, and are what the composite takes from ``guess``.
        scored: (B, H/p, W/p), true where the loss counts; elsewhere nobody has trained the prediction, and it is
            grey. Default: ``mask``.
    """
    size = (truth.shape[-2], truth.shape[-1])
    hidden, unscored = pixel_mask(mask, size), ~pixel_mask(mask if scored is None else scored, size)
    hidden, unscored = hidden.to(truth.device), unscored.to(truth.device)
    composite = torch.where(hidden, guess, truth)
    columns = [truth, truth.masked_fill(hidden, GREY), guess.masked_fill(unscored, GREY), composite]
    return Picture(RECONSTRUCTION, [column.cpu() for column in columns])


HEADS = 4
"""Heads that :func:`attention` shows each by itself."""


def attention(images: Tensor, weights: Tensor) -> Picture:
    """The image, dimmed where the mean over heads is small, and the same for the first heads by themselves.

    Args:
        images: (B, 3, H, W) in [0, 1], of :func:`to_rgb`.
        weights: (B, heads, h, w), not negative; each map's largest value is shown in full.
    """
    size = (images.shape[-2], images.shape[-1])
    maps = [weights.mean(1, keepdim=True)]
    maps += list(weights[:, :HEADS].split(1, 1)) if weights.shape[1] > 1 else []
    names = ["mean"] + [f"head {i}" for i in range(len(maps) - 1)]
    columns = [images]
    for one in maps:
        scaled = one / one.amax((2, 3), keepdim=True).clamp(min=1e-12)
        columns.append(images * F.interpolate(scaled, size=size, mode="nearest"))
    return Picture(("image", *names), [column.float().cpu() for column in columns])
