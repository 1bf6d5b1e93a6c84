"""Which file names are images, and how any name is shown."""

from __future__ import annotations

import os

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
_NAMES_SHOWN = 5


def is_image(name: str) -> bool:
    """Whether the name ends like an image's."""
    return name.lower().endswith(EXTENSIONS)


def printable(path: str) -> str:
    """The path, safe to print and to write as UTF-8 whatever bytes it holds."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def shown(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f"; and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return "; ".join(printable(name) for name in names[:_NAMES_SHOWN]) + more
