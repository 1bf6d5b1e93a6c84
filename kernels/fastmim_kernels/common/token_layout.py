"""Images and masks cut into tokens, and the pixel losses on them: shared by the masked losses."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

LOSSES = ("l1", "l2", "smooth_l1")
EPS = 1e-5
"""Added to the count of masked pixels, as in Microsoft's implementation."""


def patchify(images: Tensor, stride: int) -> Tensor:
    """(B, C, h·s, w·s) → (B, h, w, C·s²), the inverse of a pixel shuffle."""
    return patches_of(images, stride).flatten(3)


def patches_of(images: Tensor, stride: int) -> Tensor:
    """(B, C, h·s, w·s) as (B, h, w, C, s, s), without a copy."""
    b, c, height, width = images.shape
    x = images.reshape(b, c, height // stride, stride, width // stride, stride)
    return x.permute(0, 2, 4, 1, 3, 5)


def cover(grid: tuple[int, ...], images: Tensor, stride: int) -> Tensor:
    """``images`` with zeros at the end, so that ``grid`` tokens of ``stride`` pixels cover them exactly."""
    pad_h, pad_w = grid[0] * stride - images.shape[2], grid[1] * stride - images.shape[3]
    return F.pad(images, (0, pad_w, 0, pad_h)) if pad_h or pad_w else images


def token_cells(mask: Tensor, size: tuple[int, ...], grid: tuple[int, ...], stride: int) -> Tensor:
    """The mask of images of ``size`` (H, W) in token layout: (B, Hm, Wm) bool → (B, h, w, rows, cols) bool.

    A token has rows × cols cells of equal size; cells are as large as mask and token edges allow, single
    pixels at worst. Cells beyond the image are false.
    """
    cell_h, cell_w = size[0] // mask.shape[1], size[1] // mask.shape[2]
    fine_h, fine_w = math.gcd(cell_h, stride), math.gcd(cell_w, stride)
    if fine_h != cell_h:
        mask = mask.repeat_interleave(cell_h // fine_h, 1)
    if fine_w != cell_w:
        mask = mask.repeat_interleave(cell_w // fine_w, 2)
    (h, w), rows, cols = grid, stride // fine_h, stride // fine_w
    pad_h, pad_w = h * rows - mask.shape[1], w * cols - mask.shape[2]
    if pad_h or pad_w:
        mask = F.pad(mask, (0, pad_w, 0, pad_h))
    return mask.reshape(-1, h, rows, w, cols).transpose(2, 3)


def normalised(patches: Tensor, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(…, C, s, s) pixels in ``dtype``; uint8 ones normalised by (C,) statistics in [0, 1] units."""
    if mean is None or std is None:
        return patches.to(dtype)
    mean, std = (v.reshape(-1, 1, 1).to(dtype) for v in (mean, std))
    return patches.to(dtype).mul_(1 / (255 * std)).sub_(mean / std)


def masked_difference(prediction: Tensor, patches: Tensor, cells: Tensor) -> Tensor:
    """(n, C, s, s) prediction − target in the dtype of ``patches``, zero outside the (n, rows, cols) cells."""
    n, c, s, _ = patches.shape
    diff = prediction.reshape(n, c, s, s).to(patches.dtype).sub(patches)
    # On a CPU a chunk holds no token without a masked pixel.
    return diff if cells.is_cpu and cells[0].numel() == 1 else mask_cells_(diff, cells)


def mask_cells_(difference: Tensor, cells: Tensor) -> Tensor:
    """(n, C, s, s) with zeros outside the (n, rows, cols) cells, in place.

    Of whole pixels, once for all channels: a product over cells of few pixels takes several times as long.
    """
    n, _, s, _ = difference.shape
    rows, cols = cells.shape[1:]
    weight = cells.to(difference.dtype).view(n, rows, 1, cols, 1).expand(-1, -1, s // rows, -1, s // cols)
    return difference.mul_(weight.reshape(n, 1, s, s))


def loss_sum(difference: Tensor, loss: str) -> Tensor:
    """Σ l(difference); every loss is 0 at 0, so a masked difference needs no weight."""
    if loss == "l1":
        return difference.abs().sum()
    if loss == "l2":
        return difference.square().sum()
    magnitude = difference.abs()
    return torch.where(magnitude < 1, 0.5 * magnitude.square(), magnitude - 0.5).sum()


def loss_gradient_(difference: Tensor, loss: str) -> Tensor:
    """l'(difference), in place."""
    if loss == "l1":
        return difference.sign_()
    return difference.mul_(2) if loss == "l2" else difference.clamp_(-1, 1)


def token_chunks(cells: Tensor, size: int = 256) -> Iterator[tuple[Tensor | slice, Tensor]]:
    """(row numbers, cells) of the tokens that contain masked pixels, ``size`` tokens at a time; slices where all do.

    ``cells`` is :func:`token_cells`. On other devices than the CPU the number of such tokens is unknown
    without a synchronisation: there all tokens are yielded, those with masked pixels first.
    """
    flat = cells.flatten(0, 2)
    hit = flat.flatten(1).any(1)
    if cells.device.type == "cpu":
        order = hit.nonzero().squeeze(1)
        if len(order) == len(hit):
            for start in range(0, len(hit), size):
                yield (rows := slice(start, start + size)), flat[rows]
            return
    else:
        size *= 16
        order = torch.argsort(hit, descending=True, stable=True)
    for chosen in order.split(size) if len(order) else ():
        yield chosen, flat[chosen]


def pixel_scale(target: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / (masked pixels + 1e-5) / C as a scalar tensor."""
    area = (target.shape[2] // mask.shape[1]) * (target.shape[3] // mask.shape[2])
    return 1 / (mask.sum(dtype=dtype) * area + EPS) / target.shape[1]
