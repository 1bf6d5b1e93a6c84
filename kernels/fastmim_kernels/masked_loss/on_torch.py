"""``masked_l1`` in torch, in chunks that stay in cache: only tokens that contain masked pixels, where they are few."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..common.rows import shown_bits, zero_rows_
from ..common.token_layout import (
    cover,
    loss_gradient_,
    loss_sum,
    mask_cells_,
    masked_difference,
    normalised,
    patches_of,
    patchify,
    pixel_scale,
    token_cells,
    token_chunks,
)
from .inputs import wide_dtype

VALUES = 1 << 19
"""Pixels of the prediction that are worked on at a time where all are."""


def forward(prediction: Tensor, target: Tensor, mask: Tensor, mean: Tensor | None, std: Tensor | None, stride: int,
            loss: str) -> tuple[Tensor, Tensor]:
    """Arguments and results of the op ``fastmim::masked_l1``."""
    total = prediction.new_zeros((), dtype=wide_dtype(prediction.dtype, target.dtype))
    for _, difference in _differences(prediction, target, mask, mean, std, stride):
        total += loss_sum(difference, loss)
    scale = pixel_scale(target, mask, total.dtype)
    return total * scale, scale


def backward(grad: Tensor, prediction: Tensor, target: Tensor, mask: Tensor, mean: Tensor | None, std: Tensor | None,
             scale: Tensor, stride: int, loss: str) -> Tensor:
    """Arguments and result of the op ``fastmim::masked_l1_backward``."""
    out = torch.empty_like(prediction, memory_format=torch.contiguous_format)
    flat, factor, written = out.flatten(0, 2), grad * scale, False
    for rows, difference in _differences(prediction, target, mask, mean, std, stride):
        slope = loss_gradient_(difference, loss).flatten(1)
        if not (written or isinstance(rows, slice)):
            out.zero_()  # slices cover all rows
        written = True
        if isinstance(rows, slice):
            torch.mul(slope, factor, out=flat[rows])  # product, cast and store in one pass
        else:
            flat[rows] = slope.mul_(factor).to(flat.dtype)
    return out if written else out.zero_()


def _differences(prediction: Tensor, target: Tensor, mask: Tensor, mean: Tensor | None, std: Tensor | None,
                 stride: int) -> Iterator[tuple[Tensor | slice, Tensor]]:
    """Yield (row numbers of the flattened tokens, masked difference) in chunks that stay in cache."""
    grid, wide = prediction.shape[1:3], wide_dtype(prediction.dtype, target.dtype)
    cells = token_cells(mask, target.shape[2:], grid, stride)
    if prediction.is_cpu and (prediction.numel() <= VALUES or _most(cells)):
        yield from _all_differences(prediction, target, cells, mean, std, stride, wide)
        return
    patches = patchify(cover(grid, target, stride), stride).flatten(0, 2)
    flat = prediction.flatten(0, 2)
    size = (target.shape[1], stride, stride)
    for rows, chosen in token_chunks(cells):
        chunk = normalised(patches[rows].unflatten(1, size), mean, std, wide)
        yield rows, masked_difference(flat[rows], chunk, chosen)


def _most(cells: Tensor) -> bool:
    """Whether more than half of the tokens hold a masked pixel."""
    return bool(2 * cells.flatten(3).any(3).sum() > cells[..., 0, 0].numel())


def _all_differences(prediction: Tensor, target: Tensor, cells: Tensor, mean: Tensor | None, std: Tensor | None,
                     stride: int, wide: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The same over all tokens, some images at a time.

    Where more than half of them count, or all are few, copies of those and of their patches cost more than the others.
    """
    grid, tokens = prediction.shape[1:3], prediction[0, ..., 0].numel()
    images = max(VALUES // prediction[0].numel(), 1)
    for start in range(0, len(prediction), images):
        part = slice(start, start + images)
        pixels = normalised(patches_of(cover(grid, target[part], stride), stride), mean, std, wide)
        chunk = prediction[part].contiguous().view(pixels.shape)
        difference = chunk - pixels if chunk.dtype == wide else chunk.to(wide).sub_(pixels)
        difference, chosen = difference.contiguous().flatten(0, 2), cells[part].flatten(0, 2)
        if chosen[0].numel() == 1:
            zero_rows_(difference.flatten(1), shown_bits(chosen.logical_not().view(-1), wide))
        else:
            mask_cells_(difference, chosen)
        yield slice(start * tokens, (start + images) * tokens), difference
