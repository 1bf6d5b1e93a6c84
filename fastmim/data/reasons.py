"""Why bytes are not an image that can be used: what the file says of itself, where a decoder says less."""

from __future__ import annotations

import io

from PIL import TiffImagePlugin

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_WIDTH, _BITS, _SAMPLES, _PLANAR, _SAMPLE_FORMAT = 256, 258, 277, 284, 339
_TYPES = {1: "uint", 2: "int", 3: "float", 5: "complex int", 6: "complex"}
#: First bytes of formats that are read here: a file that has them is an image, and damaged.
_KNOWN = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    *((magic, "TIFF") for magic in _TIFF),
)


def why_unidentified(data: bytes | bytearray) -> str:
    """The reason, in one line, for a file in which PIL finds no image."""
    if data.startswith(_TIFF):
        samples = tiff_samples(data)
        if samples is not None:
            return f"TIFF with {samples}: not a kind that is read; save 1, 3 or 4 bands of uint8 or uint16, or 1 of float32"
    head = f"it starts with {bytes(data[:12])!r}"
    known = next((name for magic, name in _KNOWN if data.startswith(magic)), None)
    if known is None and data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        known = "WebP"
    return f"damaged {known}: its header cannot be read" if known else f"not an image ({head})"


def tiff_samples(data: bytes | bytearray) -> str | None:
    """Such as "13 uint16 samples a pixel (16-bit)", by its tags; None where they cannot be read."""
    found = _tiff_tags(data)
    if found is None:
        return None
    count, kinds, planes = found
    bits = "/".join(dict.fromkeys(f"{''.join(filter(str.isdigit, kind))}-bit" for kind in kinds))
    return f"{count} {'/'.join(kinds)} sample{'s' * (count > 1)} a pixel ({bits}{', in planes' * planes})"


def _tiff_tags(data: bytes | bytearray) -> tuple[int, list[str], bool] | None:
    """(samples a pixel, their types without repeats, whether each of several bands lies by itself)."""
    file = io.BytesIO(data)
    big = data[2:4] in (b"+\0", b"\0+")
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(16 if big else 8))
        file.seek(tags.next)
        tags.load(file)
        if _WIDTH not in tags:
            return None
        count, bits = int(tags.get(_SAMPLES, 1)), tags.get(_BITS, (1,))
        forms = tags.get(_SAMPLE_FORMAT, (1,))
        named = [f"{_TYPES.get(form, 'undefined ')}{bit}" for bit, form in zip(bits, forms * len(bits), strict=False)]
        return count, list(dict.fromkeys(named)), count > 1 and tags.get(_PLANAR, 1) == 2
    except Exception:  # PIL's reader meets damaged files with whatever Python raises
        return None
