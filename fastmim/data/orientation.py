"""The orientation that a file states of itself, and the image turned by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastmim.data import tiff
from fastmim.data.plugins import open_image


def orientation_of(data: bytes | bytearray) -> int:
    """The orientation that EXIF, or a TIFF's tag, gives: 1 to 8 (EXIF 2.3, tag 274); 1 without any."""
    if data.startswith(tiff.MAGIC):
        found: Any = tiff.orientation(data)
    else:
        try:
            found = open_image(data).getexif().get(tiff.ORIENTATION, 1)
        except Exception:  # of an array there is none; a damaged file is met where it is decoded
            return 1
    return found if found in _UPRIGHT else 1


def upright(image: Tensor, orientation: int) -> Tensor:
    """(C, H, W) as it is shown by a viewer that heeds the orientation."""
    return _UPRIGHT[orientation](image).contiguous()


_UPRIGHT: dict[int, Callable[[Tensor], Tensor]] = {
    1: lambda image: image,
    2: lambda image: image.flip(-1),
    3: lambda image: image.flip(-2, -1),
    4: lambda image: image.flip(-2),
    5: lambda image: image.transpose(-2, -1),
    6: lambda image: image.rot90(-1, (-2, -1)),
    7: lambda image: image.flip(-2, -1).transpose(-2, -1),
    8: lambda image: image.rot90(1, (-2, -1)),
}
