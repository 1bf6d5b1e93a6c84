"""The objective's picture of some images, as a grid in a file."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, features
from torch import Tensor

from fastmim.evaluate.validation import MASK_SEED, evaluating
from fastmim.files import replacing
from fastmim.objectives.pictures import RECONSTRUCTION, Picture, stretched, to_rgb

_GAP = 4
_HEADING = 24
_FONT_SIZE = 16
# Pixels of the longer edge of an image, and of its width, whose heading it must hold.
_MIN_CELL = 192
_MIN_WIDTH = 96
DESCRIPTION = "Description"
"""Keyword (PNG specification, 11.3.4.2) of the text in a picture's file that says what its columns are."""
_MEANINGS = dict(zip(RECONSTRUCTION, ("", "what the encoder sees, with hidden patches in grey",
                                      "where the loss counts", "the image with its hidden patches as predicted"),
                     strict=True))  # fmt: skip


def draw_grid(picture: Picture) -> Image.Image:
    """The columns side by side, one row per image, under their headings."""
    headings, columns = picture
    count, _, height, width = columns[0].shape
    # Small images are enlarged by whole factors: masked squares stay square and headings fit.
    zoom = max(1, -(-_MIN_CELL // max(height, width)), -(-_MIN_WIDTH // width))
    cell = (width * zoom, height * zoom)
    # Pillow without FreeType has one small font only.
    font = ImageFont.load_default(_FONT_SIZE if features.check("freetype2") else None)
    size = (len(columns) * (cell[0] + _GAP) + _GAP, _HEADING + count * (cell[1] + _GAP))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for i, (heading, column) in enumerate(zip(headings, columns, strict=True)):
        left = _GAP + i * (cell[0] + _GAP)
        draw.text((left, _GAP // 2), heading, fill="black", font=font)
        for row, image in enumerate(column):
            tile = draw_image(image).resize(cell, Image.Resampling.NEAREST)
            canvas.paste(tile, (left, _HEADING + row * (cell[1] + _GAP)))
    return canvas


def write_grid(picture: Picture, path: Path) -> None:
    """:func:`draw_grid` as a PNG, which says in words what its columns are; it appears complete or not at all."""
    columns = [f"{name} ({_MEANINGS[name]})" if _MEANINGS.get(name) else name for name in picture.headings]
    text = PngImagePlugin.PngInfo()
    text.add_text(DESCRIPTION, f"From the left: {', '.join(columns)}.")
    with replacing(path) as partial:
        draw_grid(picture).save(partial, format="PNG", pnginfo=text)


def draw_image(image: Tensor) -> Image.Image:
    """One (3, H, W) image in [0, 1], a pixel a pixel."""
    return Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def rgb_of(images: Tensor, bands: Sequence[int] | None = None) -> Tensor:
    """(B, C, H, W) uint8 or float images of a loader -> (B, 3, H, W) in [0, 1], see :mod:`fastmim.objectives.pictures`.

    Args:
        bands: numbers of the channels that are shown, from 1 on.
    """
    return stretched(images, bands) if images.is_floating_point() else to_rgb(images.float() / 255, bands)


def save_picture(
    objective: Any,
    images: Tensor,
    sample_ids: Tensor,
    path: str | Path,
    *,
    autocast: AbstractContextManager[Any] | None = None,
    write: bool = True,
) -> bool:
    """Write the objective's picture of a batch as a PNG, with the masks that validation uses.

    Args:
        objective: the plain :class:`~fastmim.objectives.Objective`; its training mode is kept.
        images: (B, C, H, W), uint8 or normalised float, on the objective's device.
        sample_ids: (B,) int64.
        path: the PNG to write; it appears complete or not at all.
        autocast: precision of the forward pass.
        write: False only takes part in a forward pass that needs all ranks.

    Returns:
        Whether the objective has a picture.
    """
    path = Path(path)
    mask = objective.random_mask(sample_ids, seed=MASK_SEED, epoch=0)
    with evaluating(objective), autocast or nullcontext():
        picture = objective.picture(images, mask)
    if picture is None or not write:
        return picture is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    write_grid(picture, path)
    return True


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
