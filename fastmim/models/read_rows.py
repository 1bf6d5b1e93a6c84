"""The tokens of the last block that something reads: rows of the others need no projection, MLP or norm.

SimMIM's head reads masked tokens only. How many these are is data, which only a CPU can tell without waiting;
elsewhere, and for compilers and counters, every row is computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import fastmim_kernels as fk
from fastmim_kernels.common.token_layout import token_cells


def masked_tokens(mask: Tensor, size: tuple[int, int], grid: tuple[int, int], stride: int) -> Tensor | None:
    """(rows,) numbers of the tokens of a (B, h, w) map that contain masked pixels; None if that saves nothing.

    Args:
        mask: (B, Hm, Wm) bool or 0/1 of images of ``size``.
        grid, stride: (h, w) of the map, and the pixels of a token's edge.
    """
    if not fk.shape_may_follow(mask):
        return None
    hit = token_cells(mask != 0, size, grid, stride).flatten(3).any(-1).flatten()
    rows = hit.nonzero().squeeze(1)
    return rows if 0 < len(rows) < len(hit) else None


def hidden_tokens(mask: Tensor, grid: tuple[int, int], shown: int) -> Tensor:
    """(B, h·w) bool: the tokens of an (h, w) map that a mask of whole tokens hides.

    Args:
        mask: (B, Hm, Wm) bool or 0/1; h and w divide Hm and Wm.
        grid: (h, w).
        shown: Visible tokens of each image.

    Raises:
        ValueError: Another number is visible, or a part of one; said where a value may be looked at.
    """
    batch, rows, columns = mask.shape
    cells = (mask != 0).view(batch, grid[0], rows // grid[0], grid[1], columns // grid[1])
    first = cells[:, :, :1, :, :1]
    hidden = first.flatten(1)
    if fk.shape_may_follow(mask):
        size = f"{rows // grid[0]} x {columns // grid[1]} patches"
        if bool((cells != first).any()):
            raise ValueError(f"mask: hides a part of a token; hide whole ones, of {size} each: use random_mask()")
        counts = (~hidden).sum(1)
        if bool((counts != shown).any()):
            raise ValueError(
                f"mask: must show {shown} of the {grid[0] * grid[1]} tokens of every image, each of {size}; "
                f"got {sorted(set(counts.tolist()))}; use random_mask()"
            )
    return hidden


def count_shown(mask: Tensor, grid: tuple[int, int]) -> int:
    """Tokens that the mask (1, Hm, Wm) of an image leaves visible; arguments as of :func:`hidden_tokens`.

    For inference: it waits for the device, and shapes then follow the mask.

    Raises:
        ValueError: None is visible.
    """
    count = int((mask[:, :: mask.shape[1] // grid[0], :: mask.shape[2] // grid[1]] == 0).sum())
    if not count:
        raise ValueError(f"mask: hides all {grid[0] * grid[1]} tokens of an image; leave one visible")
    return count


def shown_tokens(mask: Tensor, grid: tuple[int, int], count: int) -> Tensor:
    """(B, count) numbers of the tokens that :func:`hidden_tokens` leaves, in order; arguments as there."""
    return hidden_tokens(mask, grid, count).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


def take(x: Tensor, rows: Tensor) -> Tensor:
    """(B, …, C) → (rows, C)."""
    return x.flatten(0, -2).index_select(0, rows)


def put(x: Tensor, rows: Tensor, shape: Sequence[int]) -> Tensor:
    """(rows, C) → (*shape, C), zero elsewhere; inverse of :func:`take`."""
    return x.new_zeros(math.prod(shape), x.shape[-1]).index_copy_(0, rows, x).view(*shape, x.shape[-1])
