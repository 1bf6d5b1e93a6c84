"""What the samples of a file become: uint8 channels, by the range of the values, by alpha, by a fourth band.

Samples keep the depth of the file up to here, so that no bit is lost before the range is known.
"""

from __future__ import annotations

import io
import struct
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ALPHA = ("white", "black", "drop")
Array = np.ndarray[Any, Any]

_TIFF_ORIENTATION, _TIFF_EXTRA, _TIFF_BANDS = 274, 338, 277
_UNASSOCIATED_ALPHA = 2
# PIL turns TIFFs, and nothing else, by their tag; these turn them back.
_TURN_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
# PIL keeps the high byte of each sample; read with the other byte order it keeps the low one.
_LOW_BYTE = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}


class Samples(NamedTuple):
    """One image as it is stored."""

    colour: Array  # (1 or 3, H, W): uint8, uint16, int32 or float32
    fourth: Array | None = None  # (H, W)
    is_alpha: bool = False  # whether `fourth` says how opaque a pixel is
    own_range: bool = False  # the file itself states its range, and the reader has applied it


class UnusableError(ValueError):
    """These samples cannot become pixels; the message is the reason."""


def check_conversion(value_range: Sequence[float] | None, alpha: str) -> None:
    """Raise ValueError, naming the config key, for a range or a treatment of alpha that does not exist."""
    if value_range is not None and not (
        len(value_range) == 2 and np.isfinite(value_range).all() and value_range[0] < value_range[1]
    ):
        shown = list(value_range)
        raise ValueError(f"data.value_range={shown}: must be [low, high] with low < high, for example [0, 4095]")
    if alpha not in ALPHA:
        raise ValueError(f"data.alpha={alpha!r}: unknown; use one of {', '.join(ALPHA)}")


def to_pixels(
    samples: Samples, *, in_chans: int, value_range: Sequence[float] | None = None, alpha: str = "white"
) -> Tensor:
    """uint8 (in_chans, H, W).

    Args:
        in_chans: 1 (grey; of colours the luma of BT.601), 3, or 4: colours and the fourth samples, 255 without any.
        value_range: the sample values that become 0 and 255, in between linear, outside clipped; None: what the
            type holds (of 16 bits the high byte). Alpha always has the range of its type.
        alpha: with 1 or 3 channels, "white" or "black" is put behind transparent pixels; "drop" shows what is stored.

    Raises:
        UnusableError: the type has no range of its own and none is given, or it does not reach the one given.
    """
    stated = None if samples.own_range else value_range
    colour = _levels(samples.colour, stated)
    if in_chans == 4:
        fourth = samples.fourth
        last = (
            np.full_like(colour[:1], 255)
            if fourth is None
            else _levels(fourth[None], None if samples.is_alpha else stated)
        )
        return torch.from_numpy(np.concatenate([np.broadcast_to(colour, (3, *colour.shape[1:])), last]))
    if samples.fourth is not None and samples.is_alpha and alpha != "drop":
        colour = _over(colour, _levels(samples.fourth, None), 255 if alpha == "white" else 0)
    if in_chans == 1 and len(colour) == 3:
        red, green, blue = colour.astype(np.uint32)
        colour = ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.uint8)[None]
    if in_chans == 3 and len(colour) == 1:
        colour = colour.repeat(3, 0)
    return torch.from_numpy(np.ascontiguousarray(colour))


def _levels(values: Array, value_range: Sequence[float] | None) -> Array:
    if value_range is None:
        if values.dtype == np.uint8:
            return values
        if values.dtype == np.uint16:
            return (values >> 8).astype(np.uint8)
        kind = "32-bit float" if values.dtype.kind == "f" else "signed or 32-bit"
        raise UnusableError(f"no range is defined for {kind} samples; give data.value_range=[low, high]")
    low, high = value_range
    if values.dtype.kind in "iu" and np.iinfo(values.dtype).max < high:
        bits, most = 8 * values.dtype.itemsize, np.iinfo(values.dtype).max
        raise UnusableError(f"{bits}-bit samples end at {most}, below the {high:g} of data.value_range")
    scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise UnusableError("holds samples that are not finite")
    return np.rint(scaled.clip(0, 255)).astype(np.uint8)


def _over(colour: Array, opacity: Array, background: int) -> Array:
    weight = opacity.astype(np.uint32)
    return ((colour * weight + background * (255 - weight) + 127) // 255).astype(np.uint8)


def transparent_where(colour: Array, key: Sequence[int]) -> Array:
    """Alpha of a PNG whose tRNS chunk names one colour, in samples as stored."""
    hit = (colour == np.array(key).reshape(-1, 1, 1)).all(0)
    return np.where(hit, 0, np.iinfo(colour.dtype).max).astype(colour.dtype)


def png_kind(data: bytes | bytearray) -> tuple[int, int, bytes | None]:
    """(bits a sample, colour type, body of tRNS or None) of a PNG."""
    bits, colour, position = data[24], data[25], 8
    while position + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"tRNS":
            return bits, colour, bytes(data[position + 8 : position + 8 + size])
        if kind == b"IDAT":
            break
        position += size + 12
    return bits, colour, None


def png_key(data: bytes | bytearray) -> list[int] | None:
    """The colour that a grey or RGB PNG calls transparent, in samples of 8 or 16 bits; None without one."""
    bits, colour, body = png_kind(data)
    if body is None or colour not in (0, 2) or len(body) != (2 if colour == 0 else 6):
        return None
    key = struct.unpack(f">{len(body) // 2}H", body)
    return [value if bits == 16 else (value & (1 << bits) - 1) * 255 // ((1 << bits) - 1) for value in key]


def pil_samples(image: Image.Image, data: bytes | bytearray) -> Samples:
    """The samples of an image that PIL has opened and not loaded; `data` are its bytes.

    The pixels are those stored: no orientation is applied. Of several frames or pages the first is taken.

    Raises:
        UnusableError: PIL has no way to give all samples.
    """
    is_tiff = image.format == "TIFF"
    tags: Any = getattr(image, "tag_v2", {}) if is_tiff else {}
    extra = tuple(tags.get(_TIFF_EXTRA, ()))
    turned, bands = tags.get(_TIFF_ORIENTATION, 1), tags.get(_TIFF_BANDS, 1)
    if extra == (0,):
        # PIL reads over an unspecified extra sample, but not over an alpha channel.
        data = _with_extra_sample(data, _UNASSOCIATED_ALPHA)
        image = Image.open(io.BytesIO(data))
    samples = _stored(image, data, is_alpha=not is_tiff or extra in ((1,), (2,)))
    if is_tiff and bands not in (1, 2, 3, 4):
        raise UnusableError(f"TIFF with {bands} bands: only 1 to 4 are read")
    return _turned_back(samples, turned) if turned != 1 else samples


def _stored(image: Image.Image, data: bytes | bytearray, is_alpha: bool) -> Samples:
    depth = _raw_mode(image)
    own_range = image.format in ("PPM", "JPEG2000")
    if image.mode in ("RGB", "RGBA") and depth.partition(";")[2] in ("16L", "16B", "16N"):
        array = _sixteen_bits(image, depth, data)
    elif image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        array = np.asarray(image).astype(np.uint16)
    elif image.mode in ("I", "F"):
        array = np.asarray(image)
    elif image.mode in ("P", "PA"):
        array = np.array(image.convert("RGBA" if "transparency" in image.info or image.mode == "PA" else "RGB"))
    elif image.mode in ("LA", "RGBA", "L", "RGB"):
        array = np.array(image)
    else:
        direct = {"1": "L", "La": "LA", "RGBa": "RGBA"}
        array = np.array(image.convert(direct.get(image.mode, "RGB")))
    planes = array.transpose(2, 0, 1) if array.ndim == 3 else array[None]
    key = png_key(data) if image.format == "PNG" else None
    if len(planes) in (2, 4):
        return Samples(planes[:-1], planes[-1], is_alpha, own_range)
    return Samples(planes, None if key is None else transparent_where(planes, key), key is not None, own_range)


def _raw_mode(image: Image.Image) -> str:
    args = image.tile[0].args if isinstance(getattr(image, "tile", None), list) and image.tile else None  # type: ignore[attr-defined]
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def _sixteen_bits(image: Image.Image, depth: str, data: bytes | bytearray) -> Array:
    """uint16 (H, W, C) of an image that PIL reads at 8 bits only: its high bytes, then its low ones."""
    if depth.startswith("RGBa"):
        raise UnusableError("16-bit samples multiplied by alpha: save them unmultiplied")
    low: Any = Image.open(io.BytesIO(data))
    low.tile = [
        part._replace(args=raw) if isinstance(part.args, str) else part._replace(args=(raw, *part.args[1:]))
        for part in low.tile
        for raw in [_raw_of(part.args)[:-1] + _LOW_BYTE[_raw_of(part.args)[-1]]]
    ]
    return np.asarray(image).astype(np.uint16) << 8 | np.asarray(low)


def _raw_of(args: Any) -> str:
    return str(args if isinstance(args, str) else args[0])


def _turned_back(samples: Samples, orientation: int) -> Samples:
    method = _TURN_BACK.get(orientation)
    if method is None:
        return samples
    colour = np.stack([_transposed(plane, method) for plane in samples.colour])
    fourth = None if samples.fourth is None else _transposed(samples.fourth, method)
    return samples._replace(colour=colour, fourth=fourth)


def _transposed(plane: Array, method: Image.Transpose) -> Array:
    way = Image.Transpose
    return {
        way.FLIP_LEFT_RIGHT: lambda: plane[:, ::-1],
        way.FLIP_TOP_BOTTOM: lambda: plane[::-1],
        way.ROTATE_180: lambda: plane[::-1, ::-1],
        way.TRANSPOSE: lambda: plane.T,
        way.TRANSVERSE: lambda: plane[::-1, ::-1].T,
        way.ROTATE_90: lambda: np.rot90(plane),
        way.ROTATE_270: lambda: np.rot90(plane, 3),
    }[method]()


def _with_extra_sample(data: bytes | bytearray, kind: int) -> bytes:
    """A TIFF or BigTIFF whose first directory calls its one extra sample `kind` (TIFF 6.0, ExtraSamples)."""
    order = "<" if data[:2] == b"II" else ">"
    big = struct.unpack_from(order + "H", data, 2)[0] == 43
    start = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)[0]
    count = struct.unpack_from(order + ("Q" if big else "H"), data, start)[0]
    entry, width, value = start + (8 if big else 2), 20 if big else 12, 12 if big else 8
    changed = bytearray(data)
    for place in range(entry, entry + count * width, width):
        tag, _, number = struct.unpack_from(order + ("HHQ" if big else "HHI"), data, place)
        if tag == _TIFF_EXTRA and number == 1:
            struct.pack_into(order + "H", changed, place + value, kind)
    return bytes(changed)
