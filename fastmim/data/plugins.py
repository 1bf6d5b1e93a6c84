"""Formats that Pillow reads through another installed package: HEIC, AVIF where it was built without, JPEG XL."""

from __future__ import annotations

import functools
import importlib
import io

from PIL import Image

from fastmim.wording import install_packages

#: What a file of the format holds in its first bytes, its name, and the package that teaches Pillow to read it.
_FORMATS = (
    ((b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc", b"ftypheim"), "HEIC", "pillow-heif"),
    ((b"ftypavif", b"ftypavis"), "AVIF", "pillow-avif-plugin"),
    ((b"\xff\x0a", b"\0\0\0\x0cJXL "), "JPEG XL", "pillow-jxl-plugin"),
)
_HEAD = 16


def open_image(data: bytes | bytearray) -> Image.Image:
    """``PIL.Image.open`` of bytes, with the plugins that are installed.

    Raises:
        PIL.UnidentifiedImageError: not an image that this installation knows.
        OSError: an image of a format whose plugin is not installed; the message names it.
    """
    try:
        return Image.open(io.BytesIO(data))
    except Image.UnidentifiedImageError:
        named = _needs(bytes(data[:_HEAD]))
        if named is None:
            raise
    _register()
    try:
        return Image.open(io.BytesIO(data))
    except Image.UnidentifiedImageError:
        name, package = named
        how = install_packages(package)
        raise OSError(f"{name} cannot be read here: {how}, or convert it; or it is damaged") from None


def _needs(head: bytes) -> tuple[str, str] | None:
    for marks, name, package in _FORMATS:
        if any(head.startswith(mark) or (mark.startswith(b"ftyp") and head[4:12] == mark) for mark in marks):
            return name, package
    return None


@functools.cache
def _register() -> None:
    for module in ("pillow_heif", "pillow_avif", "pillow_jxl"):
        try:
            plugin = importlib.import_module(module)
        except ImportError:
            continue
        # pillow_heif registers when asked, the others when imported.
        if hasattr(plugin, "register_heif_opener"):
            plugin.register_heif_opener()
