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
        masks = "masks the only unit" if units == 1 else f"masks all {units} units"
        raise ValueError(f"mask_ratio={mask_ratio}: {masks}; use a smaller ratio, a smaller unit or larger images")
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


def over_patches(units: Tensor, grid: tuple[int, int], repeat: int) -> Tensor:
    """Masks of units (B, R, C) → (B, *grid): each over ``repeat`` × ``repeat`` patches, cut at the far edges."""
    _, rows, cols = units.shape
    mask = units[:, :, None, :, None].expand(-1, rows, repeat, cols, repeat)
    return mask.reshape(-1, rows * repeat, cols * repeat)[:, : grid[0], : grid[1]]


def random_units(sample_ids: Tensor, units: int, count: int, seed: int, epoch: int) -> Tensor:
    """(B, units) bool with ``count`` true in each row, drawn uniformly without replacement.

    Args:
        sample_ids: (B,) integer; what is drawn of an id is the same in every batch.
        units: Of an image.
        count: Of them true.
        seed, epoch: Further keys.

    Raises:
        ValueError: ``sample_ids`` is not a vector of integers.
    """
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
