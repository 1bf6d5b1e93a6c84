"""Random masks that are a pure function of (seed, epoch, sample id), computed where the ids live.

A mask therefore does not depend on the worker, the rank, the world size, the device or a restart.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .keys import check_ids, random_keys


def masked_units(mask_ratio: float, units: int) -> int:
    """Number of masked units of an image: ceil(units·mask_ratio), as in SimMIM.

    Raises:
        ValueError: ``mask_ratio`` is outside (0, 1), or leaves no visible unit.
    """
    if not 0 < mask_ratio < 1:
        raise ValueError(f"mask_ratio={mask_ratio}: must be {'< 1' if mask_ratio >= 1 else '> 0'}, for example 0.6")
    count = math.ceil(units * mask_ratio)
    if count >= units:
        raise ValueError(
            f"mask_ratio={mask_ratio}: masks all {units} units; use a smaller ratio, a smaller unit or larger images"
        )
    return count


def check_unit(unit: int, patch_size: int) -> None:
    """A mask unit covers whole patches.

    Raises:
        ValueError: Names the nearest units that do.
    """
    if unit < patch_size or unit % patch_size:
        nearest = dict.fromkeys((max(unit // patch_size, 1) * patch_size, max(-(-unit // patch_size), 1) * patch_size))
        options = " or ".join(map(str, nearest))
        raise ValueError(f"unit={unit}: not a multiple of patch_size {patch_size}; use {options}")


def unit_count(img_size: tuple[int, int], unit: int) -> int:
    """Mask units of an image, those cut by its far edges included."""
    return math.prod(-(-edge // unit) for edge in img_size)


def pixel_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Mask (B, rows, columns) -> (B, 1, H, W) bool, each entry repeated over its patch."""
    patches = (size[0] // mask.shape[1], size[1] // mask.shape[2])
    mask = mask.bool().repeat_interleave(patches[0], 1).repeat_interleave(patches[1], 2)
    return mask[:, None]


def coarse_mask(mask: Tensor, size: tuple[int, int], edge: int) -> Tensor:
    """Mask (B, rows, columns) of images of ``size`` → one of images that have a pixel for every ``edge`` × ``edge``.

    Such a pixel is masked if one of those in it is; ``edge`` divides ``size``. A mask of whole such pixels is returned.
    """
    if all(full // cells % edge == 0 for full, cells in zip(size, mask.shape[1:], strict=True)):
        return mask
    squares = pixel_mask(mask, size)[:, 0].unflatten(2, (-1, edge)).unflatten(1, (-1, edge))
    return squares.any(4).any(2)


def random_mask(
    sample_ids: Tensor,
    *,
    grid: tuple[int, int],
    repeat: int,
    mask_ratio: float,
    seed: int = 0,
    epoch: int = 0,
) -> Tensor:
    """Masks of ceil(units·mask_ratio) units drawn uniformly without replacement per image.

    Args:
        sample_ids: (B,) integer; the mask of an id is the same in every batch.
        grid: (rows, columns) of the model's patch grid.
        repeat: Patches per edge of a mask unit; units at the far edges may be cut by the image.
        mask_ratio: Share of masked units.
        seed, epoch: Two further keys.

    Returns:
        (B, rows, columns) bool on the device of ``sample_ids``, true = masked.

    Raises:
        ValueError: ``sample_ids`` is not a vector of integers, or the ratio masks everything or nothing.
    """
    rows, cols = math.ceil(grid[0] / repeat), math.ceil(grid[1] / repeat)
    mask = random_units(sample_ids, rows * cols, masked_units(mask_ratio, rows * cols), seed, epoch)
    mask = mask.view(-1, rows, 1, cols, 1).expand(-1, rows, repeat, cols, repeat)
    return mask.reshape(-1, rows * repeat, cols * repeat)[:, : grid[0], : grid[1]]


def random_units(sample_ids: Tensor, units: int, count: int, seed: int, epoch: int) -> Tensor:
    """(B, units) bool with ``count`` true in each row, drawn uniformly; arguments as of :func:`random_mask`."""
    check_ids(sample_ids)
    keys = random_keys(sample_ids, units, seed, epoch)
    chosen = keys.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros(keys.shape, dtype=torch.bool, device=keys.device).scatter(1, chosen, True)


def kept_patches(mask_ratio: float, patches: int) -> int:
    """Number of visible patches of an image: int(patches·(1 − mask_ratio)), as in MAE.

    Raises:
        ValueError: ``mask_ratio`` hides all of them or none.
    """
    count = int(patches * (1 - mask_ratio))
    if not 0 < mask_ratio < 1 or not 0 < count < patches:
        raise ValueError(
            f"mask_ratio={mask_ratio}: must hide some of the {patches} patches and leave some visible, for example 0.75"
        )
    return count


def split_patches(mask: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """What (B, L) bool masks that leave ``kept`` patches each say, as int64 numbers.

    Returns:
        (B, kept) visible patches and (B, L − kept) hidden ones, both ascending; (B, L): of each patch its place among
        the visible ones, −1 where it is hidden.
    """
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    places = torch.where(mask, -1, mask.logical_not().cumsum(1) - 1)
    return order[:, :kept], order[:, kept:], places
