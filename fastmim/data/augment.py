"""Random resized crops, flips and quarter turns, keyed per sample: one description for every loader.

The box is drawn as torchvision's RandomResizedCrop draws it (same formulas, same order of draws), but from a
generator per sample: torchvision can only draw from the process-wide one. What differs between the loaders is
only who resizes: torchvision here, DALI in ``dali.py``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

INTERPOLATIONS = ("bilinear", "bicubic", "lanczos")
_BOX_TRIES = 10
_ROUNDING = 1e-5  # of the filter's weights in float32


@dataclass(frozen=True)
class View:
    """`count` crops of one kind that are made from every image."""

    size: tuple[int, int]  # (H, W) in pixels
    count: int = 1
    scale: tuple[float, float] = (0.67, 1.0)  # area of the box as a share of the image
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the box
    hflip: float = 0.5
    interpolation: str = "bilinear"
    margin: float = 1.0  # held-out images: edge that they are scaled to cover, over that of the crop
    auto_augment: str | None = None  # timm's policy for the crop, see `rand_augment.py`
    same_crop: bool = False  # the boxes, flips and turns of the view before, in another size
    rot90: bool = False  # turned by 0 to 3 quarter turns, each as likely


def check_views(views: Sequence[View]) -> None:
    """Raise ValueError, naming the config key, for a view that cannot be made."""
    if not views:
        raise ValueError("views=(): give at least one View")
    if views[0].same_crop or any(v.same_crop and v.count != views[i].count for i, v in enumerate(views[1:])):
        raise ValueError("View.same_crop=True: needs a view before it, with as many crops")
    for view in views:
        if len(view.size) != 2 or min(view.size) < 1:
            raise ValueError(f"model.img_size={list(view.size)}: must be two positive numbers, height and width")
        if view.count < 1:
            raise ValueError(f"View.count={view.count}: must be at least 1")
        if not 0 < view.scale[0] <= view.scale[1] <= 1:
            raise ValueError(f"data.scale={list(view.scale)}: must satisfy 0 < low <= high <= 1")
        if not 0 < view.ratio[0] <= view.ratio[1]:
            raise ValueError(f"data.ratio={list(view.ratio)}: must satisfy 0 < low <= high")
        if not 0 <= view.hflip <= 1:
            raise ValueError(f"data.hflip={view.hflip}: must lie in [0, 1]")
        if view.rot90 and view.size[0] != view.size[1]:
            raise ValueError(f"data.rot90=true: needs square crops, not model.img_size={list(view.size)}; use false")
        if not view.margin >= 1:
            raise ValueError(f"View.margin={view.margin}: must be at least 1")
        if view.interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise ValueError(f"data.interpolation={view.interpolation!r}: unknown; use one of {known}")


class Crop(NamedTuple):
    """A box in source pixels, whether the result is mirrored, and by how many quarter turns it is then turned left."""

    top: int
    left: int
    height: int
    width: int
    flip: bool
    turns: int = 0


def draw_crop(
    height: int,
    width: int,
    *,
    scale: Sequence[float],
    ratio: Sequence[float],
    hflip: float,
    rot90: bool = False,
    rng: random.Random,
) -> Crop:
    """Draw a box of area U(scale) * H * W and aspect (width / height) log-uniform in `ratio`, the flip and the turn.

    After ten boxes that do not fit, the largest centred box whose aspect lies in `ratio` is taken.
    Source: Inception-style crop as in SimMIM (arXiv:2111.09886, appendix A) with scale (0.67, 1).
    """
    for _ in range(_BOX_TRIES):
        area = height * width * rng.uniform(scale[0], scale[1])
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.random() * (height - h + 1)), int(rng.random() * (width - w + 1))
            break
    else:
        aspect = min(max(width / height, ratio[0]), ratio[1])
        w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
        top, left = (height - h) // 2, (width - w) // 2
    # Drawn last, and only where asked for: the crops of other runs stay as they are.
    return Crop(top, left, h, w, rng.random() < hflip, rng.randrange(4) if rot90 else 0)


def draw_crops(views: Sequence[View], height: int, width: int, rng: random.Random) -> list[Crop]:
    """The crops of one image, view after view; a single view draws what :func:`draw_crop` draws."""
    crops: list[Crop] = []
    for view in views:
        if view.same_crop:
            crops += crops[-view.count :]
            continue
        how: dict[str, Any] = dict(scale=view.scale, ratio=view.ratio, hflip=view.hflip, rot90=view.rot90)
        crops += [draw_crop(height, width, **how, rng=rng) for _ in range(view.count)]
    return crops


def apply_crop(image: Tensor, crop: Crop, size: tuple[int, int], interpolation: str) -> Tensor:
    """(C, H, W) -> (C, *size), uint8 or float32 (:func:`resize_valid`)."""
    box = image[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    out = _resize(box, size, interpolation)
    out = out.flip(-1) if crop.flip else out
    return out.rot90(crop.turns, (-2, -1)) if crop.turns else out


def centre_crop(image: Tensor, size: tuple[int, int], interpolation: str, margin: float = 1.0) -> Tensor:
    """(C, H, W) -> (C, *size): scaled until it just covers `margin` · `size`, then cropped in the middle.

    For a square `size` that is torchvision's Resize(round(margin · size)) + CenterCrop(size).
    """
    height, width = image.shape[-2:]
    rows, columns = round(margin * size[0]), round(margin * size[1])
    if rows * width >= columns * height:
        scaled = (rows, max(columns, int(rows * width / height)))
    else:
        scaled = (max(rows, int(columns * height / width)), columns)
    return tv.center_crop(_resize(image, scaled, interpolation), list(size))


def _resize(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    if image.is_floating_point() and (gaps := image.isnan()).any():
        return resize_valid(image, gaps, size, interpolation)
    return _filtered(image, size, interpolation)


def resize_valid(image: Tensor, gaps: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Each pixel the mean of the samples that are there, by the weights of the filter; NaN below half of the weight.

    Args:
        image: float32 (C, H, W).
        gaps: bool (C, H, W), samples that are not there.
    """
    total = _filtered(image.masked_fill(gaps, 0), size, interpolation)
    weight = _filtered(1 - gaps.to(image.dtype), size, interpolation)
    return torch.where(weight >= 0.5 - _ROUNDING, total / weight, torch.nan)


def _filtered(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    if interpolation == "lanczos":
        return _lanczos(image, size)
    return tv.resize_image(image, list(size), interpolation=InterpolationMode(interpolation), antialias=True)


def _lanczos(image: Tensor, size: tuple[int, int]) -> Tensor:
    """By PIL, channel by channel where it has no mode for so many: torch has no Lanczos filter."""
    from PIL import Image

    def resized(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.LANCZOS))

    if image.shape[0] == 3 and image.dtype == torch.uint8:
        return torch.from_numpy(resized(image.permute(1, 2, 0).contiguous().numpy()).transpose(2, 0, 1).copy())
    return torch.from_numpy(np.stack([resized(plane) for plane in image.contiguous().numpy()]))
