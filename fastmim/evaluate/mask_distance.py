"""AvgDist: how far hidden pixels lie from what the encoder sees (Xie et al. 2022, section 4.1.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmim.objectives.masks import over_patches
from fastmim.objectives.unit_masks import UnitMasks

PUBLISHED_BAND = (10.0, 20.0)
"""Pixels: the AvgDist of the paper's good runs, of images of :data:`PUBLISHED_SIZE` pixels."""
PUBLISHED_SIZE = 192
RATIOS = tuple(tenths / 10 for tenths in range(1, 10))
SQUARES = (2, 3, 4)
"""Edges of the paper's squares in units."""
UNITS = (2, 4, 8, 16, 32, 64)
TABLE_MASKS = 32
"""Masks that an entry of a table is the mean of."""


def squared_distances(hidden: Tensor) -> Tensor:
    """Exact squared Euclidean distance transform, separable (Felzenszwalb and Huttenlocher 2012, section 3).

    Args:
        hidden: (B, H, W) bool.

    Returns:
        (B, H, W) int32, from each pixel to the nearest that is not hidden, in pixels²; 0 for visible ones.

    Raises:
        ValueError: An image has no visible pixel.
    """
    if bool(hidden.flatten(1).all(1).any()):
        raise ValueError("hidden: every pixel of an image is; there is no distance to a visible one")
    _, height, width = hidden.shape
    far = height + width
    rows = torch.arange(height, dtype=torch.int32, device=hidden.device)[:, None]
    above = torch.where(hidden, -far, rows).cummax(1).values
    below = torch.where(hidden, height + far, rows).flip(1).cummin(1).values.flip(1)
    down = torch.minimum(rows - above, below - rows).clamp(max=far).square()
    # What is nearest in its own column is so in the image, unless another column has it. Columns further away than all
    # that has been found cannot.
    best = down.clone()
    for step in range(1, width):
        if step * step >= int(best.max()):
            break
        aside = down + step * step
        torch.minimum(best[..., step:], aside[..., :-step], out=best[..., step:])
        torch.minimum(best[..., :-step], aside[..., step:], out=best[..., :-step])
    return best


def average_distance(hidden: Tensor) -> float:
    """Mean over hidden pixels of the distance to the nearest visible one, in pixels.

    Args:
        hidden: (B, H, W) bool with a hidden pixel.

    Raises:
        ValueError: None is hidden, or all of an image.
    """
    if not bool(hidden.any()):
        raise ValueError("hidden: no pixel is")
    return float(squared_distances(hidden)[hidden].double().sqrt().mean())


def hidden_pixels(mask: Tensor, img_size: tuple[int, int], cell: int) -> Tensor:
    """Masks (B, rows, columns) of cells of ``cell`` pixels → (B, H, W) bool; cells may be cut by the image."""
    return over_patches(mask != 0, img_size, cell)


def distance_band(img_size: tuple[int, int]) -> tuple[float, float]:
    """:data:`PUBLISHED_BAND`; for images smaller than the paper's in proportion, which is a guess."""
    scale = min(1.0, min(img_size) / PUBLISHED_SIZE)
    return PUBLISHED_BAND[0] * scale, PUBLISHED_BAND[1] * scale


def table_units(img_size: tuple[int, int], own: int | None = None) -> list[int]:
    """Those of :data:`UNITS` of which 3 to 64 fit into the shorter edge of an image, and one's own."""
    fitting = {unit for unit in UNITS if 3 <= min(img_size) // unit <= 64}
    return sorted(fitting | (set() if own is None else {own}))


def distance_table(
    img_size: tuple[int, int], units: Sequence[int], kind: str = "random", count: int = TABLE_MASKS
) -> dict[tuple[int, float], float]:
    """AvgDist of masks of a kind by (unit, ratio): the ratios :data:`RATIOS`, or those of the squares :data:`SQUARES`.

    Whatever patches an encoder has. Ratios that leave no unit visible, and squares that do not fit, are left out.
    """
    found = {}
    for unit in units:
        cells = math.prod(-(-edge // unit) for edge in img_size)
        for ratio in [edge * edge / cells for edge in SQUARES] if kind == "square" else RATIOS:
            try:
                masks = UnitMasks(img_size, 1, kind=kind, mask_ratio=ratio, unit=unit)
            except ValueError:
                continue
            found[unit, ratio] = average_distance(masks(torch.arange(count)))
    return found
