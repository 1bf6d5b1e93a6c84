"""A picture of what the objective predicts in the masked squares."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastmim.evaluate.validation import MASK_SEED, evaluating

COLUMNS = ("image", "masked", "prediction", "composite")
GREY = 0.5
_GAP = 4
_MIN_CELL = 96


def pixel_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Mask (B, rows, columns) -> (B, 1, H, W) bool, each entry repeated over its patch."""
    patches = (size[0] // mask.shape[1], size[1] // mask.shape[2])
    mask = mask.bool().repeat_interleave(patches[0], 1).repeat_interleave(patches[1], 2)
    return mask[:, None]


def to_rgb(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 3, H, W): grey is repeated, two channels get an empty third, more are cut."""
    channels = images.shape[1]
    if channels == 1:
        return images.expand(-1, 3, -1, -1)
    if channels == 2:
        return F.pad(images, (0, 0, 0, 0, 0, 1))
    return images[:, :3]


def reconstruction_columns(
    objective: Any, images: Tensor, mask: Tensor, autocast: AbstractContextManager[Any] | None = None
) -> list[Tensor]:
    """The four pictures of every image, in the order of :data:`COLUMNS`.

    Args:
        objective: has ``normalise``, ``denormalise`` and ``reconstruct_pixels``.
        images: (B, C, H, W), uint8 or normalised float.
        mask: (B, H/p, W/p), true = masked.
        autocast: precision of the forward pass.

    Returns:
        Four float tensors (B, 3, H, W) in [0, 1]. The prediction is shown everywhere; the composite takes it
        only in masked squares. Where the target is locally normalised, the true local statistics undo that.
    """
    with evaluating(objective):
        with autocast or nullcontext():
            prediction = objective.reconstruct_pixels(images, mask)
        truth = objective.denormalise(objective.normalise(images)).float().clamp(0, 1)
        guess = objective.denormalise(prediction.float()).float().clamp(0, 1)
    hidden = pixel_mask(mask, (truth.shape[-2], truth.shape[-1])).to(truth.device)
    pictures = [truth, truth.masked_fill(hidden, GREY), guess, torch.where(hidden, guess, truth)]
    return [to_rgb(picture).cpu() for picture in pictures]


def draw_grid(columns: Sequence[Tensor], headings: Sequence[str] = COLUMNS) -> Image.Image:
    """Columns of (B, 3, H, W) pictures in [0, 1] side by side, one row per image, under their headings."""
    count, _, height, width = columns[0].shape
    # Small images are enlarged by whole factors: masked squares stay square and headings fit.
    zoom = max(1, -(-_MIN_CELL // width))
    cell = (width * zoom, height * zoom)
    font = ImageFont.load_default()
    top = 20
    size = (len(columns) * (cell[0] + _GAP) + _GAP, top + count * (cell[1] + _GAP))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for i, (heading, pictures) in enumerate(zip(headings, columns, strict=True)):
        left = _GAP + i * (cell[0] + _GAP)
        draw.text((left, _GAP), heading, fill="black", font=font)
        for row, picture in enumerate(pictures):
            array = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
            tile = Image.fromarray(array).resize(cell, Image.Resampling.NEAREST)
            canvas.paste(tile, (left, top + row * (cell[1] + _GAP)))
    return canvas


def save_reconstruction(
    objective: Any,
    images: Tensor,
    sample_ids: Tensor,
    path: str | Path,
    *,
    autocast: AbstractContextManager[Any] | None = None,
    write: bool = True,
) -> Path:
    """Write the grid of a batch as a PNG, with the masks that validation uses.

    Args:
        objective: the plain objective; its training mode is kept.
        images: (B, C, H, W), uint8 or normalised float, on the objective's device.
        sample_ids: (B,) int64.
        path: the PNG to write; it appears complete or not at all.
        autocast: precision of the forward pass.
        write: False only takes part in a forward pass that needs all ranks.
    """
    path = Path(path)
    mask = objective.random_mask(sample_ids, seed=MASK_SEED, epoch=0)
    columns = reconstruction_columns(objective, images, mask, autocast)
    if not write:
        return path
    picture = draw_grid(columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    picture.save(partial, format="PNG")
    os.replace(partial, path)
    return path


def spread_images(loader: Any, count: int) -> tuple[Tensor, Tensor] | None:
    """(images, sample_ids) of up to ``count`` files evenly spread over a loader of single images.

    Neighbouring files tend to look alike. None where no file can be read.
    """
    count = min(count, loader.num_images)
    starts = [i * loader.num_images // count for i in range(count)]
    found = [next(iter(loader.epoch(0, start)), None) for start in starts]
    batches = [batch for batch in found if batch is not None]
    if not batches:
        return None
    return torch.cat([b.images for b in batches]), torch.cat([b.sample_ids for b in batches])
