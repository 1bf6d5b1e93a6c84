"""PNG files made safe for libpng: every byte is checked here, and only what makes pixels is handed on.

torchvision's decoder leaves libpng's errors by ``longjmp`` and damages memory on the way: the process dies then, or at
some later image. So libpng gets a file that is written here, of data whose checksums, sizes and rows were found right,
and meets no error. The chunks are those of the PNG specification (third edition, 4.1 and 11).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

MAGIC = b"\x89PNG\r\n\x1a\n"
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a pixel, by colour type
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
#: Adam7: first column and row of each pass, and its steps.
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_MAX_EDGE = 1_000_000  # libpng's own limit
_LAST_FILTER = 4
_GREY, _PALETTE, _GREY_ALPHA, _RGB_ALPHA = 0, 3, 4, 6


def size_of(data: bytes | bytearray) -> tuple[int, int] | None:
    """(height, width) that the header states; None where the file ends before."""
    if len(data) < 24:
        return None
    return int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")


class Kind(NamedTuple):
    """What the pixels of a checked file are."""

    is_grey: bool
    has_alpha: bool  # of every pixel, by itself or by its colour of the palette
    key: tuple[int, ...] | None  # the one colour, as decoders give it, that is transparent: of 1 or 3 samples


def kind_of(data: bytes | bytearray) -> Kind:
    """By the header and the tRNS chunk of a file that :func:`checked_png` gave."""
    bits, colour, place, alpha = data[24], data[25], 33, b""
    while data[place + 4 : place + 8] != b"IDAT":
        size = int.from_bytes(data[place : place + 4], "big")
        alpha = bytes(data[place + 8 : place + 8 + size]) if data[place + 4 : place + 8] == b"tRNS" else b""
        place += 12 + size
    if colour == _PALETTE or not alpha:
        return Kind(colour in (_GREY, _GREY_ALPHA), bool(alpha) or colour in (_GREY_ALPHA, _RGB_ALPHA), None)
    values = [int.from_bytes(alpha[k : k + 2], "big") for k in range(0, len(alpha), 2)]
    most = (1 << min(bits, 8)) - 1
    key = tuple(values) if bits == 16 else tuple((value & most) * 255 // most for value in values)
    return Kind(colour == _GREY, False, key)


def checked_png(data: bytes | bytearray) -> bytearray:
    """The same pixels as a file of IHDR, PLTE, tRNS, one IDAT and IEND, in which no decoder meets an error.

    Damage in chunks that do not make pixels (text, profiles, animations) is passed over, as decoders do. The caller has
    bounded the size: as many bytes are allocated as the stated image has.

    Raises:
        ValueError: the reason, in one line, why the file has not all the pixels that it states.
    """
    head: bytes | memoryview = b""
    palette: bytes | memoryview | None = None
    alpha: bytes | memoryview | None = None
    stream = bytearray()
    for kind, body in _chunks(data):
        if kind == b"IHDR" and not head:
            head = body
        elif not head:
            raise ValueError("PNG: its first chunk is not IHDR")
        elif kind == b"PLTE":
            palette = body
        elif kind == b"tRNS":
            alpha = body
        elif kind == b"IDAT":
            stream += body
    if len(head) != 13:
        raise ValueError("PNG: no header (truncated)" if not head else "PNG: its IHDR chunk has not 13 bytes")
    rows = _row_bytes(bytes(head))
    pixels = _inflate(stream, sum(count * length for count, length in rows))
    _check_filters(pixels, rows)
    colour, depth = head[9], head[8]
    out = bytearray(MAGIC) + _chunk(b"IHDR", head)
    if colour == _PALETTE:
        out += _palette_chunks(palette, alpha, depth)
    elif alpha is not None and len(alpha) == {0: 2, 2: 6}.get(colour):
        out += _chunk(b"tRNS", alpha)
    # Stored, not compressed again: the decoder then copies.
    return out + _chunk(b"IDAT", zlib.compress(pixels, 0)) + _chunk(b"IEND", b"")


def _chunks(data: bytes | bytearray) -> Iterator[tuple[bytes, memoryview]]:
    """(type, content) of the chunks that make pixels, their checksums compared; ends at IEND or the end of the file."""
    view, pos = memoryview(data), len(MAGIC)
    while pos + 8 <= len(data):
        length, kind = int.from_bytes(view[pos : pos + 4], "big"), bytes(view[pos + 4 : pos + 8])
        end = pos + 12 + length
        if kind == b"IEND":
            return
        if end > len(data):
            raise ValueError(f"PNG: the file ends inside its {_name(kind)} chunk (truncated)")
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT"):
            if zlib.crc32(view[pos + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
                raise ValueError(f"PNG: wrong checksum of its {_name(kind)} chunk (corrupt)")
            yield kind, view[pos + 8 : end - 4]
        elif not kind.isalpha():
            raise ValueError("PNG: a chunk has no valid name (corrupt)")
        elif kind[:1].isupper():
            raise ValueError(f"PNG: unknown critical chunk {_name(kind)}")
        pos = end


def _row_bytes(head: bytes) -> list[tuple[int, int]]:
    """(rows, bytes of a row with its filter byte) of each pass.

    Raises:
        ValueError: the header is none of the standard's.
    """
    width, height = int.from_bytes(head[0:4], "big"), int.from_bytes(head[4:8], "big")
    depth, colour, compression, filtering, interlace = head[8:13]
    if depth not in _DEPTHS.get(colour, ()) or compression or filtering or interlace > 1:
        raise ValueError(f"PNG: its header is not valid (depth {depth}, colour type {colour})")
    if not (0 < width <= _MAX_EDGE and 0 < height <= _MAX_EDGE):
        raise ValueError(f"PNG: {width}x{height} px is not a size")
    bits = depth * _SAMPLES[colour]
    passes = []
    for left, top, across, down in _PASSES if interlace else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            passes.append((rows, 1 + (columns * bits + 7) // 8))
    return passes


def _inflate(stream: bytearray, size: int) -> bytes:
    inflater = zlib.decompressobj()
    try:
        # One byte more than there may be: the rest of a bomb is never made.
        pixels = inflater.decompress(stream, size + 1)
    except zlib.error as err:
        raise ValueError(f"PNG: its compressed data is corrupt ({str(err).partition(': ')[2] or err})") from None
    if len(pixels) < size:
        raise ValueError(f"PNG: {len(pixels)} of {size} bytes of pixels (truncated)")
    if len(pixels) > size:
        raise ValueError("PNG: more pixels than its header states (corrupt)")
    return pixels


def _check_filters(pixels: bytes, rows: list[tuple[int, int]]) -> None:
    start, values = 0, np.frombuffer(pixels, dtype=np.uint8)
    for count, length in rows:
        if values[start : start + count * length : length].max() > _LAST_FILTER:
            raise ValueError("PNG: a row has no valid filter (corrupt)")
        start += count * length


def _palette_chunks(palette: bytes | memoryview | None, alpha: bytes | memoryview | None, depth: int) -> bytearray:
    if palette is None or not palette or len(palette) % 3 or len(palette) > 3 * 256:
        raise ValueError("PNG: has no valid palette")
    # Pixels may point behind a short palette: black there, as in libpng and PIL.
    whole = bytes(palette[: 3 << depth]).ljust(3 << depth, b"\0")
    out = _chunk(b"PLTE", whole)
    return out + _chunk(b"tRNS", alpha[: 1 << depth]) if alpha is not None and len(alpha) else out


def _chunk(kind: bytes, body: bytes | memoryview) -> bytearray:
    check = zlib.crc32(body, zlib.crc32(kind))
    return bytearray(len(body).to_bytes(4, "big") + kind) + body + check.to_bytes(4, "big")


def _name(kind: bytes) -> str:
    return kind.decode("ascii", "backslashreplace")
