"""Why bytes are not an image that can be used: what the file says of itself, where a decoder says less."""

from __future__ import annotations

from fastmim.data import png, tiff
from fastmim.data.arrays import NPY, NPZ

#: First bytes of formats that are read here: a file that has them is an image, and damaged.
_KNOWN = (
    (b"\xff\xd8\xff", "JPEG"),
    (png.MAGIC, "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    *((magic, "TIFF") for magic in tiff.MAGIC),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"qoif", "QOI"),
)
_ARRAYS = ((NPY, "a NumPy array"), (NPZ[0], "a zip archive, as .npz is"))


def why_unidentified(data: bytes | bytearray) -> str:
    """The reason, in one line, for a file in which PIL finds no image."""
    samples = tiff.not_read(data)
    if samples is not None:
        return samples
    for magic, what in _ARRAYS:
        if data.startswith(magic):
            return f"{what}; data.pixels=float32 reads .npy and .npz"
    head = f"it starts with {bytes(data[:12])!r}"
    known = next((name for magic, name in _KNOWN if data.startswith(magic)), None)
    if known is None and data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        known = "WebP"
    return f"damaged {known}: its header cannot be read" if known else f"not an image ({head})"
