"""Mixup, cutmix and random erasing on the training device, keyed by (seed, epoch, sample id).

Zhang et al. 2018 (mixup), Yun et al. 2019 (cutmix), Zhong et al. 2020 (erasing); how they are combined is that of
timm's fine-tuning recipes, which SimMIM, BEiT and MAE take: one of mixup and cutmix a batch, each image with the one at
the same place from the batch's end.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .keys import ERASING, MIXING, crop_keys, unit_floats

_QUANTILES = 2048
_TRIES = 10


@dataclass(frozen=True)
class Mixing:
    """What is mixed, and how often.

    Args:
        mixup, cutmix: alpha of the Beta distribution of the first image's share; 0: never.
        probability: of a batch to be mixed at all.
        switch: of cutmix where both are possible.
        smoothing: of the labels.

    Raises:
        ValueError: A value is out of range.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    probability: float = 1.0
    switch: float = 0.5
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0 (0 = never)")
        for name in ("probability", "switch", "smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must lie in [0, 1]")


def smooth(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Labels → (B, classes) float32 targets: 1 − s + s/classes for a label, s/classes for the others.

    Args:
        labels: (B,) integer; or (B, classes), 1 for each of an image's classes, or their shares.
        classes: How many.
        smoothing: s.
    """
    shares = F.one_hot(labels, classes) if labels.ndim == 1 else labels
    return shares.float() * (1 - smoothing) + smoothing / classes


def mix(
    images: Tensor, targets: Tensor, sample_ids: Tensor, how: Mixing, *, seed: int, epoch: int
) -> tuple[Tensor, Tensor]:
    """Each image with its partner, and their targets in the shares of their pixels.

    Args:
        images: (B, C, H, W) float.
        targets: (B, K) float.
        sample_ids: (B,) integer, on the device of the images; the first one keys what the batch draws.
        how: What to do; nothing of it reads a value on the host.
        seed, epoch: Further keys.
    """
    if not how.probability or not (how.mixup or how.cutmix):
        return images, targets
    keys = crop_keys(sample_ids[:1], 5, seed=seed, epoch=epoch, crop=0, purpose=MIXING)
    happens, which, share, row, column = unit_floats(keys)[0].unbind()
    cuts = which < (how.switch if how.mixup and how.cutmix else float(how.cutmix > 0))
    kept = torch.where(cuts, _beta(share, how.cutmix), _beta(share, how.mixup))
    kept = torch.where(happens < how.probability, kept, 1.0)
    inside = _box(images, kept, row, column) & cuts
    kept = torch.where(cuts, 1 - inside.float().mean(), kept)
    blended = images * kept + images.flip(0) * (1 - kept)
    pasted = torch.where(inside, images.flip(0), images)
    mixed = torch.where(cuts, pasted, blended.to(images.dtype))
    return mixed, targets * kept + targets.flip(0) * (1 - kept)


def _box(images: Tensor, kept: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """(H, W) bool: a box of the image's shape and the share 1 - kept of its area around (row, column), cut at edges."""
    height, width = images.shape[-2:]
    edge = (1 - kept).clamp(min=0).sqrt()
    spans = []
    for length, centre in ((height, row), (width, column)):
        half, middle = (length * edge).floor() // 2, (centre * length).floor()
        places = torch.arange(length, device=images.device)
        spans.append((places >= middle - half) & (places < middle + half))
    return spans[0][:, None] & spans[1]


def _beta(u: Tensor, alpha: float) -> Tensor:
    """The quantile u of Beta(alpha, alpha), from a table; 1 for alpha 0, which never mixes."""
    if not alpha:
        return torch.ones_like(u)
    table = _quantiles(alpha, u.device, u.dtype)
    place = u * (_QUANTILES - 1)
    low = place.floor().long().clamp(max=_QUANTILES - 2)
    return torch.lerp(table[low], table[low + 1], place - low)


@functools.cache
def _quantiles(alpha: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Beta(alpha, alpha) at evenly spaced probabilities, by its density in the angle: x = sin²t has none that is
    infinite at the ends."""
    angle = (np.arange(1 << 16) + 0.5) / (1 << 16) * (math.pi / 2)
    mass = np.cumsum((np.sin(angle) * np.cos(angle)) ** (2 * alpha - 1))
    wanted = np.interp(np.linspace(0, 1, _QUANTILES), mass / mass[-1], np.sin(angle) ** 2)
    return torch.as_tensor(wanted, device=device, dtype=dtype)


@dataclass(frozen=True)
class Erasing:
    """One box an image is filled with noise of its own for each pixel.

    Args:
        probability: of an image.
        area: range of the box as a share of the image.
        aspect: range of its height over its width, log-uniform.
    """

    probability: float = 0.25
    area: tuple[float, float] = (0.02, 1 / 3)
    aspect: tuple[float, float] = (0.3, 1 / 0.3)

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"erasing={self.probability}: must lie in [0, 1]")


def erase(images: Tensor, sample_ids: Tensor, noise: Tensor, how: Erasing, *, seed: int, epoch: int) -> Tensor:
    """The images, some with a box of noise.

    Args:
        images: (B, C, H, W) float, normalised.
        sample_ids: (B,) integer keys.
        noise: (C, 2H, 2W) normal values, of which each box shows those at a place of its own.
        how: How often, and which boxes; the first of ten that fits the image, none if none does.
        seed, epoch: Further keys.
    """
    if not how.probability:
        return images
    count, _, height, width = images.shape
    u = unit_floats(crop_keys(sample_ids, 3 + 4 * _TRIES, seed=seed, epoch=epoch, crop=0, purpose=ERASING))
    area, aspect, top, left = u[:, 3:].unflatten(1, (4, _TRIES)).unbind(1)
    area = (how.area[0] + (how.area[1] - how.area[0]) * area) * height * width
    aspect = (math.log(how.aspect[0]) + math.log(how.aspect[1] / how.aspect[0]) * aspect).exp()
    rows, columns = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (rows < height) & (columns < width)
    first = fits.int().argmax(1, keepdim=True)
    rows, columns, top, left = (value.gather(1, first) for value in (rows, columns, top, left))
    happens = (u[:, :1] < how.probability) & fits.any(1, keepdim=True)
    spans = [
        _span((start * (length - size + 1)).floor(), size, length)
        for start, size, length in ((top, rows, height), (left, columns, width))
    ]
    inside = (spans[0][:, :, None] & spans[1][:, None, :] & happens[:, :, None])[:, None]
    shift = [(u[:, i] * length).long() for i, length in ((1, height), (2, width))]
    places = [
        start[:, None] + torch.arange(length, device=images.device)
        for start, length in zip(shift, (height, width), strict=True)
    ]
    drawn = noise[:, places[0][:, :, None], places[1][:, None, :]].transpose(0, 1)
    return torch.where(inside, drawn.to(images.dtype), images)


def _span(start: Tensor, size: Tensor, length: int) -> Tensor:
    """(B, length) bool from (B, 1) starts and sizes."""
    places = torch.arange(length, device=start.device)
    return (places >= start) & (places < start + size)
