"""Which file names are images, and how any name is shown."""

from __future__ import annotations

import os

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tga", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".avif", ".heic", ".heif", ".jxl"),
)
#: Pictures that no reader here knows, and what images are packed in.
OTHER_IMAGES = (
    *(".npy", ".npz", ".exr", ".hdr", ".dcm", ".nii", ".nii.gz", ".svs", ".ndpi", ".czi", ".nd2", ".lif", ".svg"),
    *(".psd", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".fits", ".ico", ".mat", ".jxr"),
)
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip", ".h5", ".hdf5", ".lmdb", ".parquet", ".tfrecord", ".rec", ".7z", ".rar")
_MAGIC = (
    b"\xff\xd8\xff",
    b"\x89PNG",
    b"GIF8",
    b"II*\0",
    b"MM\0*",
    b"II+\0",
    b"MM\0+",
    b"\0\0\0\x0cjP  ",
    b"\0\0\0\x0cJXL ",
)
_MAGIC_OF_A_BOX = (b"ftypavif", b"ftypavis", b"ftypheic", b"ftypheix", b"ftypmif1")
_NAMES_SHOWN = 5


def is_image(name: str) -> bool:
    """Whether the name ends like an image's."""
    return name.lower().endswith(EXTENSIONS)


def starts_like_an_image(head: bytes) -> bool:
    """Whether the first bytes of a file are an image's, whatever its name."""
    is_webp = head.startswith(b"RIFF") and head[8:12] == b"WEBP"
    return is_webp or head.startswith(_MAGIC) or head[4:12] in _MAGIC_OF_A_BOX


def printable(path: str) -> str:
    """The path, safe to print and to write as UTF-8 whatever bytes it holds."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def shown(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f"; and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return "; ".join(printable(name) for name in names[:_NAMES_SHOWN]) + more
