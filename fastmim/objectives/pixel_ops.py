"""The pixel arithmetic of ``photometric.py``: a batch whose rows want different operations, in one sequence of steps.

On a GPU every step runs on the whole batch and is the identity for rows that do not want it: neither a shape nor a
branch depends on what was drawn. A CPU takes a few rows at a time, those of like wishes together, so that they stay in
its cache, and leaves out what none of them wants.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastmim_kernels as fk

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL's mode L
BLENDS = 7
BLENDS_BEFORE_HUE = 3
_BLUR_PASSES = 3
_VALUES_AT_ONCE = 1 << 18


class Work(NamedTuple):
    """What is done to each row of a batch.

    Blend s of seven is x ← scale·x + luma·L(x) + mean·(mean of L(x)) with the luma L, clamped to 0 ... 255.
    """

    scale: Tensor  # (B, 7) float32, 1 = idle
    luma: Tensor  # (B, 7) float32, 0 = idle
    mean: Tensor  # (B, 7) float32, 0 = idle
    turn: Tensor  # (B, 1) float32: of the hue, in circles; 0 = idle
    blur: Tensor  # (B, taps) float32, see box_weights; 0 = idle
    threshold: Tensor  # (B, 1) int16: values from here on are inverted; 256 = idle


_IDLE = Work(1, 0, 0, 0, 0, 256)  # type: ignore[arg-type]


class Steps(NamedTuple):
    """Which entries of a :class:`Work` any row wants, by column."""

    scale: list[bool]
    luma: list[bool]
    mean: list[bool]
    turn: list[bool]
    blur: list[bool]
    threshold: list[bool]


def run(images: Tensor, work: Work, possible: Steps) -> Tensor:
    """uint8 (B, C, H, W) → the same shape and dtype.

    Args:
        images: 1 or 3 channels.
        work: A row per image.
        possible: Steps that any row may want, for devices that cannot look.
    """
    if not fk.shape_may_follow(images):
        return _run(images, work, possible)
    wanted = torch.cat([column != idle for column, idle in zip(work, _IDLE, strict=True)], 1)
    widths = [column.shape[1] for column in work]
    order = (wanted.long() << torch.arange(wanted.shape[1] - 1, -1, -1)).sum(1).argsort()
    done = [images[:0]]
    for rows in order.split(max(1, _VALUES_AT_ONCE // max(1, images[:1].numel()))):
        flags = wanted[rows].any(0).split(widths)
        part = Work(*(column[rows] for column in work))
        done.append(_run(images.index_select(0, rows), part, Steps(*(flag.tolist() for flag in flags))))
    return torch.cat(done).index_select(0, order.argsort())  # these two copy whole rows, unlike out[rows] = …


def box_weights(sigma: Tensor, largest: float) -> Tensor:
    """(B, taps) float32: weights of the pixels 1, 2, ... away in a pass of the blur, that of the middle one being 1.

    PIL's Gaussian blur is three passes of a box of fractional length whose variance is that of the Gaussian
    (Gwosdek et al. 2011, equations 7, 11 and 14).

    Args:
        sigma: (B,) in pixels, 0 = not blurred.
        largest: Largest sigma there may be; it alone decides how many taps there are.
    """
    variance = sigma.double()[:, None].square() / _BLUR_PASSES
    radius = ((12 * variance + 1).sqrt() / 2 - 0.5).floor()
    edge = (2 * radius + 1) * (radius * (radius + 1) - 3 * variance) / (6 * (variance - (radius + 1).square()))
    taps = math.floor(math.sqrt(12 * largest**2 / _BLUR_PASSES + 1) / 2 - 0.5) + 1
    distance = torch.arange(1, taps + 1, device=sigma.device)
    return ((distance <= radius) + (distance == radius + 1) * edge).float()


def _run(images: Tensor, work: Work, steps: Steps) -> Tensor:
    x = images.float()
    for index in range(BLENDS):
        if index == BLENDS_BEFORE_HUE and steps.turn[0] and x.shape[1] == 3:
            _turn_hue(x, work.turn[..., None])
        if steps.scale[index] or steps.luma[index] or steps.mean[index]:
            _blend(x, work, index, steps)
    if any(steps.blur):
        _blur(x, work.blur[:, : _last(steps.blur)])
    levels = x.round_().to(torch.int16)  # twice as fast as straight to uint8
    if steps.threshold[0]:
        from_here = (work.threshold[..., None, None] - 1 - levels) >> 15
        levels = levels ^ (from_here & 255)
    return levels.to(torch.uint8)


def _last(flags: list[bool]) -> int:
    return max(index for index, flag in enumerate(flags, 1) if flag)


def _luma(x: Tensor) -> Tensor:
    """(n, C, ...) → (n, 1, ...)."""
    if x.shape[1] == 1:
        return x.clone()
    red, green, blue = x.split(1, 1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _mean(x: Tensor) -> Tensor:
    """(n, C, H, W) → (n, C, 1, 1); rows are added in float64: the order of additions depends on the size of a batch."""
    return (x.sum(3).double().mean(2) / x.shape[3]).float()[..., None, None]


def _blend(x: Tensor, work: Work, index: int, steps: Steps) -> None:
    scale, luma, mean = (weights[:, index, None, None, None] for weights in (work.scale, work.luma, work.mean))
    added: Tensor | None = None
    if steps.mean[index]:
        added = _luma(_mean(x)).mul_(mean)
    if steps.luma[index]:
        grey = _luma(x).mul_(luma)
        added = grey if added is None else grey.add_(added)
    x.mul_(scale)
    if added is not None:
        x.add_(added)
    x.clamp_(0, 255)


def _turn_hue(x: Tensor, turn: Tensor) -> None:
    """Turn the hue of (n, 3, H, W) by (n, 1, 1) circles; the largest and the smallest channel of a pixel stay (HSV)."""
    red, green, blue = x.unbind(1)
    low = x.amin(1)
    chroma = x.amax(1).sub_(low)
    # Place on the hexagon of hues in -3 ... 3: red 0, green 2, blue -2. Without a case for each of its edges:
    # with channels from 0 to 1 it is 1 + green + blue - red where green >= blue, and the negative elsewhere.
    place = (green + blue).sub_(red).sub_(low).div_(chroma.clamp(min=1e-3)).add_(1).copysign_(green - blue)
    place.add_(turn * 6)
    place.sub_((place * (1 / 6)).round_(), alpha=6)
    turned = torch.empty_like(x)
    torch.addcmul(low, chroma, place.abs().neg_().add_(2).clamp_(0, 1), out=turned[:, 0])
    torch.addcmul(low, chroma, (place + 1).abs_().sub_(1).clamp_(0, 1), out=turned[:, 1])
    torch.addcmul(low, chroma, (place - 1).abs_().sub_(1).clamp_(0, 1), out=turned[:, 2])
    x.lerp_(turned, (turn != 0).float()[:, None])  # rows without a turn stay what they are to the bit


def _blur(x: Tensor, weights: Tensor) -> None:
    """Three box passes along the rows, then along the columns, each with its edge repeated, as PIL does."""
    taps = weights.shape[1]
    columns = weights.t()[..., None, None, None].unbind()
    for dim, padding in ((3, (taps, taps, 0, 0)), (2, (0, 0, taps, taps))):
        size = x.shape[dim]
        for _ in range(_BLUR_PASSES):
            padded = F.pad(x, padding, mode="replicate")
            for distance, weight in enumerate(columns, 1):
                before, behind = (padded.narrow(dim, taps + side * distance, size) for side in (-1, 1))
                x.addcmul_(before + behind, weight)
    length = (1 + 2 * weights.sum(1))[:, None, None, None]
    length = length * length * length  # no power: that of a vector may differ from that of a single number
    x.mul_(1 / (length * length))
