"""Masks of whole units of an image, of every kind that SimMIM's paper compares (Xie et al. 2022, section 4.1.1).

All hide the same number of units in every image, and are pure functions of (seed, epoch, sample id).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastmim_kernels.common.token_layout import token_cells

from ..models.layers import to_pair
from .arguments import one_of
from .block_masks import beit_mask
from .keys import random_keys
from .masks import check_unit, masked_units, over_patches, random_units

MaskKind = Literal["random", "block", "square"]
LEAST_AREA = 16 / 75
"""Least area of which a block is drawn, as a share of what is hidden in all: BEiT's 16 of 75 patches."""
SHARE_ERROR = 0.005 + 1e-9
"""A square's share may be given to two digits."""
_SAMPLES = 256
"""Masks that a share is the mean of."""


class UnitMasks:
    """Draws the masks of a config, and is the one home of their rules.

    Args:
        img_size: (H, W) in pixels, or the edge of a square image.
        patch_size: Of the encoder, in pixels.
        kind: "random" hides units drawn uniformly without replacement. "block" hides BEiT's blocks of units
            (:func:`.block_masks.beit_mask`); what they leave short is filled by single units beside them. "square"
            hides one square of units, every place in the grid of units equally likely.
        mask_ratio: Share of hidden units; their number is rounded up. Of a square the share of its edge², two digits
            are enough.
        unit: Edge in pixels; units at the far edges may be cut by the image.

    Attributes:
        grid: (rows, columns) of units.
        hidden, shown: Units of each image.

    Raises:
        ValueError: One of them does not fit, ``argument=value: what; fix`` in one line.
    """

    def __init__(
        self, img_size: int | tuple[int, int], patch_size: int, *, kind: str, mask_ratio: float, unit: int
    ) -> None:
        self.kind, self.unit, self.mask_ratio = kind, unit, mask_ratio
        self.img_size, self.patch_size = to_pair(img_size, "img_size"), patch_size
        one_of("mask", kind, get_args(MaskKind))
        check_unit(unit, self.patch_size)
        self.grid = -(-self.img_size[0] // unit), -(-self.img_size[1] // unit)
        units = self.grid[0] * self.grid[1]
        if kind == "block" and min(self.grid) < 2:
            raise ValueError(f"mask=block: needs two units of {unit} pixels in either direction; use a smaller unit")
        self.edge = square_edge(mask_ratio, self.grid) if kind == "square" else 0
        self.hidden = self.edge**2 or masked_units(mask_ratio, units)
        self.shown = units - self.hidden

    def __call__(self, sample_ids: Tensor, *, seed: int = 0, epoch: int = 0) -> Tensor:
        """Masks of patches.

        Args:
            sample_ids: (B,) integer; the mask of an id is the same in every batch.
            seed, epoch: Further keys.

        Returns:
            (B, H/p, W/p) bool on the device of ``sample_ids``, true = masked.

        Raises:
            ValueError: ``sample_ids`` is not a vector of integers.
        """
        units = self.of_units(sample_ids, seed=seed, epoch=epoch)
        patches = -(-self.img_size[0] // self.patch_size), -(-self.img_size[1] // self.patch_size)
        return over_patches(units, patches, self.unit // self.patch_size)

    def of_units(self, sample_ids: Tensor, *, seed: int = 0, epoch: int = 0) -> Tensor:
        """(B, *grid) bool with ``hidden`` true in each; arguments as of the call."""
        if self.kind == "square":
            return square_units(sample_ids, self.grid, self.edge, seed=seed, epoch=epoch)
        if self.kind == "block":
            return block_units(sample_ids, self.grid, self.hidden, seed=seed, epoch=epoch)
        return random_units(sample_ids, math.prod(self.grid), self.hidden, seed, epoch).unflatten(1, self.grid)

    def shares(self, token_grid: tuple[int, int], stride: int) -> tuple[float, float]:
        """Mean shares of hidden patches, and of tokens with a hidden pixel, over some masks.

        Exact where units and tokens are whole multiples of each other, as every mask hides as many units, and none is
        of a part of a token.

        Args:
            token_grid: (rows, columns) of the encoder's tokens.
            stride: Pixels of a token's edge.
        """
        # Tracers ask too, whose tensors have no values.
        with _disable_current_modes():
            mask = self(torch.arange(_SAMPLES, device="cpu"))
            touched = token_cells(mask, self.img_size, token_grid, stride).flatten(3).any(-1)
            return float(mask.double().mean()), float(touched.double().mean())


def square_edge(mask_ratio: float, grid: tuple[int, int]) -> int:
    """Units along the edge of the square whose share of a grid of units is ``mask_ratio``.

    Raises:
        ValueError: There is none, or none that leaves a unit visible; names the nearest.
    """
    units = grid[0] * grid[1]
    edges = [edge for edge in range(1, min(grid) + 1) if edge * edge < units]
    if not edges:
        raise ValueError("mask=square: the image is one unit, and a square leaves some; use a smaller unit")
    near = sorted(edges, key=lambda edge: abs(edge * edge / units - mask_ratio))[:2]
    if abs(near[0] ** 2 / units - mask_ratio) > SHARE_ERROR:
        shown = " or ".join(f"{edge * edge / units:.2g} ({edge} × {edge} units)" for edge in sorted(near))
        raise ValueError(
            f"mask_ratio={mask_ratio}: mask=square hides no such share of {grid[0]} × {grid[1]} units; use {shown}"
        )
    return near[0]


def square_units(sample_ids: Tensor, grid: tuple[int, int], edge: int, *, seed: int = 0, epoch: int = 0) -> Tensor:
    """(B, *grid) bool: one square of ``edge`` × ``edge`` units, each of its places equally likely to 2⁻³².

    Raises:
        ValueError: ``sample_ids`` is not a vector of integers.
    """
    key = random_keys(sample_ids, 1, seed, epoch)
    down, right = grid[0] - edge + 1, grid[1] - edge + 1
    place = (key >> 32 & 0xFFFFFFFF) * (down * right) >> 32
    rows, columns = (torch.arange(length, device=key.device) for length in grid)
    first = place // right, place % right
    inside = [(first[i] <= n) & (n < first[i] + edge) for i, n in enumerate((rows, columns))]
    return inside[0][:, :, None] & inside[1][:, None, :]


def block_units(sample_ids: Tensor, grid: tuple[int, int], count: int, *, seed: int = 0, epoch: int = 0) -> Tensor:
    """(B, *grid) bool with ``count`` true in each: BEiT's blocks, and single units where these fall short.

    They do on small grids with large counts, as a block has to be smaller than the grid in both edges. Units that have
    a hidden one at an edge come first, in random order.

    Args:
        sample_ids: (B,) integer.
        grid: (rows, columns) of units, at least 2 × 2.
        count: Below their number.
        seed, epoch: Further keys.

    Raises:
        ValueError: ``sample_ids`` is not a vector of integers.
    """
    smallest = max(round(LEAST_AREA * count), 1)
    mask = beit_mask(sample_ids, grid=grid, count=count, smallest=smallest, seed=seed, epoch=epoch)
    wide = F.pad(mask, (1, 1, 1, 1))
    near = wide[:, :-2, 1:-1] | wide[:, 2:, 1:-1] | wide[:, 1:-1, :-2] | wide[:, 1:-1, 2:]
    rank = torch.where(mask, 0, torch.where(near, 1, 2)).flatten(1)
    keys = random_keys(sample_ids, grid[0] * grid[1], seed, epoch)
    # 61 random bits under the rank: one order for both.
    chosen = ((rank << 61) + (keys >> 3 & (1 << 61) - 1)).argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(rank, dtype=torch.bool).scatter(1, chosen, True).unflatten(1, grid)
