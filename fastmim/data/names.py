"""Which file names are images, and how any name is shown."""

from __future__ import annotations

import os
import re

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tga", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".avif", ".avifs"),
    *(".heic", ".heif", ".hif", ".jxl", ".qoi", ".pcx"),
)
#: Of NumPy: images with ``data.pixels=float32`` alone; elsewhere they lie beside images and are something else.
ARRAYS = (".npy", ".npz")
#: Pictures that are not read, and what images are packed in.
OTHER_IMAGES = (
    *(".npy", ".npz", ".exr", ".hdr", ".dcm", ".nii", ".nii.gz", ".svs", ".ndpi", ".czi", ".nd2", ".lif", ".svg"),
    *(".psd", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".fits", ".ico", ".mat", ".jxr"),
    *(".dds", ".sgi", ".ras", ".xbm", ".xpm", ".eps", ".icns", ".img", ".mha", ".nrrd", ".webm", ".mp4", ".avi"),
)
ARCHIVES = (
    *(".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst", ".zip", ".h5", ".hdf5", ".lmdb", ".mdb"),
    *(".parquet", ".arrow", ".tfrecord", ".tfrecords", ".rec", ".beton", ".7z", ".rar"),
)
_MAGIC = (
    b"\xff\xd8\xff",
    b"\x89PNG",
    b"GIF8",
    b"II*\0",
    b"MM\0*",
    b"II+\0",
    b"MM\0+",
    b"\0\0\0\x0cjP  ",
    b"\xff\x4f\xff\x51",
    b"\0\0\0\x0cJXL ",
    b"\xff\x0a",
    b"qoif",
)
_MAGIC_OF_A_BOX = (b"ftypavif", b"ftypavis", b"ftypheic", b"ftypheix", b"ftypmif1")
_PNM = re.compile(rb"P[1-6fF]\s+(#|\d)")
_NAMES_SHOWN = 5


def is_image(name: str, pixels: str = "uint8") -> bool:
    """Whether the name ends like an image's, of a run with these ``data.pixels``."""
    return name.lower().endswith(extensions(pixels))


def extensions(pixels: str = "uint8") -> tuple[str, ...]:
    """How names of images end in a run with these ``data.pixels``."""
    return EXTENSIONS + ARRAYS if pixels == "float32" else EXTENSIONS


def starts_like_an_image(head: bytes) -> bool:
    """Whether the first bytes of a file are an image's, whatever its name."""
    is_webp = head.startswith(b"RIFF") and head[8:12] == b"WEBP"
    is_bmp = head.startswith(b"BM") and head[6:10] == bytes(4) and head[15:18] == bytes(3)  # reserved; a small header
    return is_webp or is_bmp or head.startswith(_MAGIC) or head[4:12] in _MAGIC_OF_A_BOX or bool(_PNM.match(head))


def printable(path: str) -> str:
    """The path, safe to print and to write as UTF-8 whatever bytes it holds."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def shown(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f"; and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return "; ".join(printable(name) for name in names[:_NAMES_SHOWN]) + more
