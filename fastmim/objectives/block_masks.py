"""Block-wise masks (BEiT, iBOT) as pure functions of (seed, epoch, sample id, crop), and the rows that masks hide.

A mask grows block by block: the area is uniform between a smallest one and what is still to be masked, the aspect
log-uniform, the place uniform; a block must be smaller than the grid in both edges and hide between one and the
remaining number of further cells. After ten refused blocks in a row the mask stays as it is: it may hold fewer cells
than aimed at. Source: Bao et al. 2022 (BEiT), algorithm 1; Zhou et al. 2022 (iBOT), appendix; as their code does it.

Every try has its own 64-bit hash. What is computed from it are sums, products, quotients, roots and roundings, one at a
time, sizes in float64, places (16 bits times a small number) exactly in float32. IEEE 754 defines these to the last
bit: outside of a compiler, which may contract a product and a sum, masks are the same on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import fastmim_kernels as fk

from .keys import BLOCK_MASKS, crop_keys

TRIES = 10
BLOCKS = 24
"""Blocks after which a mask stays as it is, for a fixed number of steps. In 10^5 masks on grids up to 32 x 32 it took
15 at most, and each further block is two to four times as rare as the one before."""
ASPECT = (0.3, 1 / 0.3)
IBOT_RATIOS = ((0.0, 0.0), (0.1, 0.5))

Ratios = Sequence[tuple[float, float]]


def ibot_mask(
    sample_ids: Tensor,
    *,
    grid: tuple[int, int],
    ratios: Ratios = IBOT_RATIOS,
    shape: str = "block",
    seed: int = 0,
    epoch: int = 0,
    crop: int | Tensor = 0,
) -> Tensor:
    """Masks as iBOT draws them: each row takes one of ``ratios``, then a share of its cells uniform in that range.

    Args:
        sample_ids: (B,) integer.
        grid: (rows, columns): patches of a ViT, final tokens of Swin, over whose patches the mask is then repeated.
        ratios: Ranges (low, high), all equally likely; the default leaves half of the images unmasked.
        shape: "block", or "random" for single cells, whose number is then exact, rounded down.
        seed, epoch, crop: Further keys; ``crop`` is a number, or (B,) integer for rows of several crops.

    Returns:
        (B, rows, columns) bool on the device of ``sample_ids``, true = masked, :func:`most_masked` at most in each.

    Raises:
        ValueError: Ids or crops that are no integers, a range outside [0, 1), a grid without place for blocks.
    """
    if not ratios:
        raise ValueError("ratios=(): give at least one range (low, high)")
    _check(grid, ratios, shape)
    cells = grid[0] * grid[1]
    count = BLOCKS * TRIES if shape == "block" else cells
    keys = crop_keys(sample_ids, 2 + count, seed=seed, epoch=epoch, crop=crop, purpose=BLOCK_MASKS)
    which = _bits(keys[:, 0], 0) * len(ratios) >> 16
    share = (keys[:, 1] >> 11 & (1 << 53) - 1).double() * 2.0**-53
    target = torch.zeros_like(share)
    for index, (low, high) in enumerate(ratios):
        target = torch.where(which == index, low + (high - low) * share, target)
    target = target * cells
    if shape == "random":
        ranks = keys[:, 2:].argsort(dim=1, stable=True).argsort(dim=1)
        return (ranks < target.floor()[:, None]).view(-1, *grid)
    return _grow(keys[:, 2:], grid, target, (min(grid) // 3) ** 2)


def beit_mask(
    sample_ids: Tensor,
    *,
    grid: tuple[int, int],
    count: int = 75,
    smallest: int = 16,
    seed: int = 0,
    epoch: int = 0,
    crop: int | Tensor = 0,
) -> Tensor:
    """Masks as BEiT draws them: at most ``count`` cells (exactly so in two thirds of 75 on 14 x 14).

    Args:
        sample_ids: (B,) integer.
        grid: (rows, columns) of the mask.
        count: Cells aimed at.
        smallest: Least area of which a block is drawn, in cells.
        seed, epoch, crop: As of :func:`ibot_mask`.

    Returns:
        (B, rows, columns) bool on the device of ``sample_ids``, true = masked.

    Raises:
        ValueError: Ids or crops that are no integers, a count that leaves no cell visible, a grid without place.
    """
    _check(grid, (), "block")
    if not 0 < count < grid[0] * grid[1]:
        raise ValueError(f"count={count}: must lie between 1 and {grid[0] * grid[1] - 1}, the grid has one cell more")
    if smallest < 0:
        raise ValueError(f"smallest={smallest}: must be at least 0")
    keys = crop_keys(sample_ids, BLOCKS * TRIES, seed=seed, epoch=epoch, crop=crop, purpose=BLOCK_MASKS)
    target = torch.full(sample_ids.shape, float(count), dtype=torch.float64, device=sample_ids.device)
    return _grow(keys, grid, target, smallest)


def most_masked(grid: tuple[int, int], ratios: Ratios = IBOT_RATIOS) -> int:
    """Cells that a mask of :func:`ibot_mask` can hold at most: its capacity of rows per image."""
    return int(max(high for _, high in ratios) * (grid[0] * grid[1]))


def most_rows(crops: int, grid: tuple[int, int], ratios: Ratios = IBOT_RATIOS) -> int:
    """Masked cells of so many masks of :func:`ibot_mask` together, which one batch in 10^12 exceeds at most.

    Chernoff's bound (1952), min over t of (n · log E exp(t·x) - log 1e-12) / t, for independent x of a mixture of
    uniform distributions, which are what masks aim at and do not exceed; 52 cells of 196 each for 128 masks.
    """
    cells, least = grid[0] * grid[1], 1e12
    for power in range(-60, 21):
        t = 2 ** (power / 8)
        terms = [(math.exp(t * low), t * (high - low)) for low, high in ratios]
        mean = sum(start * (math.expm1(x) / x if x else 1.0) for start, x in terms) / len(terms)
        least = min(least, (crops * math.log(mean) + math.log(1e12)) / t)
    return max(min(math.ceil(least * cells), crops * most_masked(grid, ratios)), 1)


def masked_rows(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The masked rows of a batch in a fixed number of places, and the weights of a mean per image.

    ``(loss_of_rows * weights).sum() / B`` is the mean over images of the mean over their masked rows, where an image
    without any counts as zero, as in iBOT. Nothing waits for the device.

    Args:
        mask: (B, ...) bool or 0/1, 1 = masked.
        capacity: Places of the whole batch. B times what one mask holds at most (:func:`most_masked`) is enough
            for any batch. Masked rows beyond it are left out, the last ones, and the weights of their images then
            do not add up to one.

    Returns:
        (capacity,) int64 numbers of rows of the flattened mask, all different: the masked ones in ascending order, then
        visible ones to fill the places. And (capacity,) float32 weights: 1 / masked rows of its image, 0 for visible.

    Raises:
        ValueError: The capacity is not positive, or there are fewer rows.
    """
    mask = mask.flatten(1) != 0
    if not 0 < capacity <= mask.numel():
        raise ValueError(f"capacity={capacity}: must lie between 1 and the {mask.numel()} rows of the mask")
    weight = row_weights(mask)
    flat, numbers = mask.flatten(), torch.arange(mask.numel(), device=mask.device)
    before = flat.cumsum(0)
    place = torch.where(flat, before - 1, before[-1] + numbers - before).clamp(max=capacity)
    # What has no place goes to one behind the last, which is cut off.
    rows = torch.zeros(capacity + 1, dtype=torch.int64, device=mask.device).scatter_(0, place, numbers)
    weights = torch.zeros(capacity + 1, device=mask.device).scatter_(0, place, weight.flatten())
    return rows[:capacity], weights[:capacity]


def row_weights(mask: Tensor) -> Tensor:
    """(B, L) bool → (B, L) float32: 1 / masked rows of its image, 0 for visible ones."""
    return mask / mask.sum(1, keepdim=True).clamp(min=1)


def _check(grid: tuple[int, int], ratios: Ratios, shape: str) -> None:
    if shape not in ("block", "random"):
        raise ValueError(f"shape={shape!r}: must be block or random")
    if shape == "block" and min(grid) < 2:
        raise ValueError(f"grid={tuple(grid)}: blocks need two cells in either direction; use smaller patches")
    for low, high in ratios:
        if not 0 <= low <= high < 1:
            raise ValueError(f"ratios={tuple(ratios)}: each must satisfy 0 <= low <= high < 1")


def _bits(keys: Tensor, first: int) -> Tensor:
    return keys >> first & 0xFFFF


def _units(bits: Tensor) -> Tensor:
    """16 bits as float64 in (0, 1), exact."""
    return bits.double().add_(0.5).mul_(2.0**-16)


def _exp(x: Tensor) -> Tensor:
    """exp(x) to 1e-9 for |x| < 4, from sums and products alone: the exponentials of devices differ in the last bit."""
    x = x * 2.0**-4
    y = torch.full_like(x, 1 / math.factorial(7))
    for power in range(6, -1, -1):
        y.mul_(x).add_(1 / math.factorial(power))
    for _ in range(4):
        y.mul_(y)
    return y


def _grow(keys: Tensor, grid: tuple[int, int], target: Tensor, smallest: int) -> Tensor:
    """(B, *grid) masks of up to ``target`` (B,) float64 cells from (B, BLOCKS · TRIES) hashes.

    A CPU leaves out rows that want none, and stops when all have stopped; the masks are the same.
    """
    if fk.shape_may_follow(target) and not target.all():
        some = target.nonzero().squeeze(1)
        mask = torch.zeros(len(target), *grid, dtype=torch.bool)
        return mask.index_copy_(0, some, _grow(keys.index_select(0, some), grid, target[some], smallest))
    shapes, areas, places = _draws(keys)
    target = target[:, None]
    edge = max(grid)
    numbers = torch.arange(edge, dtype=torch.float32, device=keys.device)
    # Both axes in one tensor, and so a square mask: half as many operations.
    edges = grid[0] + (grid[1] - grid[0]) * torch.arange(2, device=keys.device)[:, None, None]
    mask = torch.zeros(len(target), edge, edge, device=keys.device)
    count, left = torch.zeros_like(target), target
    for shape, area, place in zip(shapes, areas, places, strict=True):
        extent = ((smallest + (left - smallest) * area) * shape).sqrt_().round_().float()
        first = ((edges + 1 - extent) * place).floor_()
        rows, columns = _span(numbers, first, extent)
        gain = extent[0] * extent[1] - (rows @ mask).mul_(columns).sum(-1)
        fits = (extent < edges).all(0) & (gain > 0) & (gain <= left)
        found, taken = fits.max(1, keepdim=True)
        rows, columns = _pick(rows, taken), _pick(columns, taken)
        mask = torch.maximum(mask, rows.mT * (columns * found[..., None]))
        count = torch.where(found, count + gain.gather(1, taken), count)
        left = torch.where(found, target - count, 0.0)  # nothing fits in nothing: the mask has stopped
        if fk.shape_may_follow(left) and not left.any():
            break
    return (mask != 0)[:, : grid[0], : grid[1]]


def _draws(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the tries of each block drew: the squared height and width of a block of area 1 (BLOCKS, 2, B, TRIES); the
    share of the range of areas (BLOCKS, B, TRIES); the shares of the ranges of the first row and column, as the first.
    """
    keys = keys.reshape(-1, BLOCKS, TRIES).transpose(0, 1).contiguous()
    low, high = map(math.log, ASPECT)
    aspect = _exp(_units(_bits(keys, 16)).mul_(high - low).add_(low))
    places = torch.stack((_bits(keys, 32), _bits(keys, 48)), 1).float().mul_(2.0**-16)
    return torch.stack((aspect, 1 / aspect), 1), _units(_bits(keys, 0)), places


def _span(numbers: Tensor, first: Tensor, length: Tensor) -> Tensor:
    """(..., n): one for ``numbers`` (n,) from ``first`` (...) on for ``length`` (...), else zero."""
    inside = numbers - first[..., None]
    return torch.minimum(inside + 1, length[..., None] - inside).clamp_(0, 1)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """(B, T, n), (B, 1) → (B, 1, n)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
