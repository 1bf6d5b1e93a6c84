"""Masks that somebody chooses: a square, or what is painted in a picture."""

from __future__ import annotations

import math
import os

import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fastmim.objectives.masks import check_unit

_LEVEL = 0.5
"""Share of a cell that must be painted for it to be hidden, and brightness from which a pixel is."""


def square_cells(rows: int, columns: int, share: float) -> Tensor:
    """(rows, columns) bool: the centred square of about ``share`` of all cells, at least one of them.

    Raises:
        ValueError: ``share`` is outside (0, 1), or such a square does not fit.
    """
    if not 0 < share < 1:
        raise ValueError(f"--ratio {share:g}: must lie between 0 and 1, for example 0.25")
    edge = max(round(math.sqrt(share * rows * columns)), 1)
    if edge > min(rows, columns) or edge * edge == rows * columns:
        raise ValueError(f"--ratio {share:g}: a square of {edge} cells leaves nothing visible of {rows} x {columns}")
    cells = torch.zeros(rows, columns, dtype=torch.bool)
    top, left = (rows - edge) // 2, (columns - edge) // 2
    cells[top : top + edge, left : left + edge] = True
    return cells


def painted_cells(path: str | os.PathLike[str], rows: int, columns: int) -> Tensor:
    """(rows, columns) bool of a picture, stretched to that shape: hidden where half of a cell is white.

    Transparent pixels count as black.

    Raises:
        ValueError: it is no picture, or everything or nothing of it is white.
    """
    try:
        with Image.open(path) as image:
            painted = image.convert("RGBA")
    except FileNotFoundError:
        raise ValueError(f"--mask {path}: no such file; give random, square or a picture") from None
    except IsADirectoryError:
        raise ValueError(f"--mask {path}: is a folder; give random, square or a picture") from None
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"--mask {path}: not a readable picture ({' '.join(str(error).split())[:120]})") from None
    black = Image.new("RGBA", painted.size, (0, 0, 0, 255))
    grey = Image.alpha_composite(black, painted).convert("L")
    pixels = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(1, 1, grey.height, grey.width)
    white = (pixels >= 255 * _LEVEL).float()
    cells = F.adaptive_avg_pool2d(white, (rows, columns))[0, 0] >= _LEVEL
    if not cells.any() or cells.all():
        what = "nothing" if not cells.any() else "everything"
        raise ValueError(
            f"--mask {path}: {what} would be hidden, in {rows} x {columns} cells; white pixels hide, and half of a "
            "cell must be white"
        )
    return cells


def cell_grid(img_size: tuple[int, int], unit: int, patch_size: int) -> tuple[int, int]:
    """(rows, columns) of cells of ``unit`` pixels.

    Raises:
        ValueError: a cell is not of whole patches, or the image not of whole cells.
    """
    check_unit(unit, patch_size)
    for edge in img_size:
        if edge % unit:
            raise ValueError(f"--unit {unit}: does not divide the image size {img_size[0]} x {img_size[1]}")
    return img_size[0] // unit, img_size[1] // unit
