"""``masked_l1`` in torch: only tokens that contain masked pixels, in chunks that stay in cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..common.token_layout import (
    cover,
    loss_gradient_,
    loss_sum,
    masked_difference,
    normalised,
    patchify,
    pixel_scale,
    token_cells,
    token_chunks,
)
from .inputs import wide_dtype


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
    out = torch.zeros_like(prediction, memory_format=torch.contiguous_format)
    flat = out.flatten(0, 2)
    for rows, difference in _differences(prediction, target, mask, mean, std, stride):
        slope, factor = loss_gradient_(difference, loss).flatten(1), grad * scale
        if isinstance(rows, slice):
            torch.mul(slope, factor, out=flat[rows])  # product, cast and store in one pass
        else:
            flat[rows] = slope.mul_(factor).to(flat.dtype)
    return out


def _differences(prediction: Tensor, target: Tensor, mask: Tensor, mean: Tensor | None, std: Tensor | None,
                 stride: int) -> Iterator[tuple[Tensor | slice, Tensor]]:
    """Yield (row numbers of the flattened tokens, masked difference) in chunks that stay in cache."""
    grid = prediction.shape[1:3]
    cells = token_cells(mask, target.shape[2:], grid, stride)
    patches = patchify(cover(grid, target, stride), stride).flatten(0, 2)
    flat = prediction.flatten(0, 2)
    size = (target.shape[1], stride, stride)
    for rows, chosen in token_chunks(cells):
        chunk = normalised(patches[rows].unflatten(1, size), mean, std, wide_dtype(prediction.dtype, target.dtype))
        yield rows, masked_difference(flat[rows], chunk, chosen)
