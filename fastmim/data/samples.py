"""What the samples of a file become: uint8 channels, by the range of the values, by alpha, by a fourth band.

Samples keep the depth of the file up to here, so that no bit is lost before the range is known.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmim.data import png, tiff
from fastmim.data.reading import background
from fastmim.wording import plural

Array = np.ndarray[Any, Any]

# PIL turns TIFFs, and nothing else, by their tag; these turn them back.
_TURN_BACK: dict[int, Callable[[Array], Array]] = {
    2: lambda plane: plane[:, ::-1],
    3: lambda plane: plane[::-1, ::-1],
    4: lambda plane: plane[::-1],
    5: lambda plane: plane.T,
    6: lambda plane: np.rot90(plane),
    7: lambda plane: plane[::-1, ::-1].T,
    8: lambda plane: np.rot90(plane, 3),
}
# PIL keeps the high byte of each sample; read with the other byte order it keeps the low one.
_LOW_BYTE = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}


class Samples(NamedTuple):
    """One image as it is stored."""

    colour: Array  # (1 or 3, H, W): uint8, uint16, int8, int16, int32, uint32 or float32
    fourth: Array | None = None  # (H, W)
    is_alpha: bool = False  # whether `fourth` says how opaque a pixel is
    premultiplied: bool = False  # by `fourth`
    own_range: bool = False  # the file itself states its range, other than its type's, and the reader has applied it
    is_cut: bool = False  # the reader gives the high byte alone


class UnusableError(ValueError):
    """These samples cannot become pixels; the message is the reason."""


def to_pixels(
    samples: Samples, *, in_chans: int, value_range: Sequence[float] | None = None, alpha: str = "white"
) -> Tensor:
    """uint8 (in_chans, H, W).

    Args:
        in_chans: 1 (grey; of colours the luma of BT.601), 3, or 4: colours and the fourth samples, 255 without any.
        value_range: the sample values that become 0 and 255, in between linear, outside clipped; None: what the
            type holds (of 16 bits the high byte). Alpha always has the range of its type; a file that states a range of
            another number of bits (PGM's maximum, 12-bit TIFF, JPEG 2000's precision) keeps that.
        alpha: with 1 or 3 channels, "white", "black" or the colour "#rrggbb" is put behind transparent pixels (with 1
            its luma); "drop" shows what is stored.

    Raises:
        UnusableError: the type has no range of its own and none is given, or it does not reach the one given.
    """
    stated = None if samples.own_range else value_range
    if samples.is_cut and stated is not None:
        raise UnusableError("its reader gives 8 of its 16 bits, and data.value_range needs all; save it as RGB PNG")
    colour = _levels(samples.colour, stated)
    if in_chans == 4:
        fourth = samples.fourth
        last = (
            np.full_like(colour[:1], 255)
            if fourth is None
            else _levels(fourth[None], None if samples.is_alpha else stated)
        )
        return torch.from_numpy(np.concatenate([np.broadcast_to(colour, (3, *colour.shape[1:])), last]))
    if in_chans == 3 and len(colour) == 1:
        colour = colour.repeat(3, 0)
    under = background(alpha)
    if samples.fourth is not None and samples.is_alpha and under is not None:
        behind = np.array(under, np.uint8).reshape(3, 1, 1)
        behind = behind if len(colour) == 3 else _luma(behind)
        colour = _over(colour, _levels(samples.fourth, None), behind, samples.premultiplied)
    if in_chans == 1 and len(colour) == 3:
        colour = _luma(colour)
    return torch.from_numpy(np.ascontiguousarray(colour))


def _luma(colour: Array) -> Array:
    """uint8 (3, …) -> (1, …), of BT.601."""
    red, green, blue = colour.astype(np.uint32)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.uint8)[None]


def _levels(values: Array, value_range: Sequence[float] | None) -> Array:
    if value_range is None:
        if values.dtype == np.uint8:
            return values
        if values.dtype == np.uint16:
            return (values >> 8).astype(np.uint8)
        kind = f"{8 * values.dtype.itemsize}-bit samples ({values.dtype})"
        raise UnusableError(f"no range is defined for {kind}; give data.value_range=[low, high]")
    low, high = value_range
    if values.dtype.kind in "iu" and np.iinfo(values.dtype).max < high:
        bits, most = 8 * values.dtype.itemsize, np.iinfo(values.dtype).max
        raise UnusableError(f"{bits}-bit samples end at {most}, below the {high:g} of data.value_range")
    scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise UnusableError("holds samples that are not finite")
    return np.rint(scaled.clip(0, 255)).astype(np.uint8)


def _over(colour: Array, opacity: Array, behind: Array, premultiplied: bool) -> Array:
    weight = opacity.astype(np.uint32)
    own = colour * np.uint32(255) if premultiplied else colour * weight
    return ((own + behind * (255 - weight) + 127) // 255).clip(0, 255).astype(np.uint8)


def transparent_where(colour: Array, key: Sequence[int]) -> Array:
    """Alpha of a PNG whose tRNS chunk names one colour, in samples as stored."""
    hit = (colour == np.array(key).reshape(-1, 1, 1)).all(0)
    return np.where(hit, 0, np.iinfo(colour.dtype).max).astype(colour.dtype)


def pil_samples(image: Image.Image, data: bytes | bytearray, extra: int | None = None) -> Samples:
    """The samples of an image that PIL has opened and not loaded; `data` are its bytes.

    The pixels are those stored: no orientation is applied. Of several frames or pages the first is taken.

    Args:
        extra: what :func:`fastmim.data.tiff.for_pil` says of it.

    Raises:
        UnusableError: PIL has no way to give all samples.
    """
    if image.format != "TIFF":
        return _stored(image, data)
    tags: Any = dict(image.tag_v2)  # type: ignore[attr-defined]
    bands, bits = tags.get(tiff.BANDS, 1), max(tags.get(tiff.BITS, (1,)))
    if bands > 4 or (bands > 1 and bits > 8 and tags.get(tiff.PLANAR) == tiff.SEPARATE):
        raise UnusableError(tiff.not_read(data) or f"TIFF with {plural(bands, 'band')} of {plural(bits, 'bit')}")
    samples = _stored(image, data)
    samples = samples._replace(
        colour=_as_stated(samples.colour, bits, set(tags.get(tiff.FORMAT, ())) == {tiff.SIGNED}),
        is_alpha=extra in (tiff.PREMULTIPLIED, tiff.ALPHA) or (bands == 2 and extra is None),
        premultiplied=extra == tiff.PREMULTIPLIED,
    )
    if bits == 12:
        samples = samples._replace(colour=(samples.colour.astype(np.uint32) * 65535 // 4095).astype(np.uint16))
        samples = samples._replace(own_range=True)
    return _turned_back(samples, tags.get(tiff.ORIENTATION, 1))


def _as_stated(colour: Array, bits: int, is_signed: bool) -> Array:
    """PIL gives signed bytes as unsigned ones, and other whole numbers that it has no mode for as int32."""
    if colour.dtype == np.uint8 and is_signed:
        return colour.view(np.int8)
    if colour.dtype == np.int32:
        return colour.astype(np.int16) if bits == 16 else colour if is_signed else colour.view(np.uint32)
    return colour


def _stored(image: Image.Image, data: bytes | bytearray) -> Samples:
    tile: Any = (getattr(image, "tile", None) or [None])[0]
    depth = "" if tile is None else _raw_mode(tile.args)
    is_cut = own_range = False
    if tile is not None and tile.codec_name == "ppm" and data[:2] in (b"P5", b"P6") and tile.args[1] > 255:
        array, own_range = _deep_pnm(image, tile, data), tile.args[1] != 65535
    elif depth[:-1] in ("RGB;16", "RGBA;16"):
        array = _sixteen_bits(image, data)
    elif image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        array = np.asarray(image).astype(np.uint16)
        own_range = image.format == "JPEG2000" and _precision(data) < 16
    elif image.mode in ("I", "F"):
        array = np.asarray(image)
    elif image.mode in ("P", "PA"):
        array = np.array(image.convert("RGBA" if "transparency" in image.info or image.mode == "PA" else "RGB"))
    else:
        kept = {"1": "L", "L": "L", "LA": "LA", "La": "LA", "RGBA": "RGBA", "RGBa": "RGBA"}
        array, is_cut = np.array(image.convert(kept.get(image.mode, "RGB"))), ";16" in depth
    planes = array.transpose(2, 0, 1) if array.ndim == 3 else array[None]
    if len(planes) in (2, 4):
        return Samples(planes[:-1], planes[-1], True, is_cut=is_cut)
    key = png.kind_of(data).key if image.format == "PNG" else None
    fourth = None if key is None else transparent_where(planes, key)
    return Samples(planes, fourth, key is not None, own_range=own_range, is_cut=is_cut)


def _raw_mode(args: Any) -> str:
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def _deep_pnm(image: Image.Image, tile: Any, data: bytes | bytearray) -> Array:
    """uint16 (H, W) or (H, W, 3) of a binary PNM, whose samples PIL brings to 8 bits."""
    shape = (image.height, image.width, 3) if image.mode == "RGB" else (image.height, image.width)
    values = np.frombuffer(data, ">u2", count=int(np.prod(shape)), offset=tile.offset).reshape(shape)
    return (values.astype(np.uint64) * 65535 // tile.args[1]).clip(0, 65535).astype(np.uint16)


def _precision(data: bytes | bytearray) -> int:
    """Bits a sample of a JPEG 2000 codestream, of its first component (ITU T.800, SIZ)."""
    place = data.find(b"\xff\x4f\xff\x51")
    return (data[place + 42] & 0x7F) + 1 if 0 <= place < len(data) - 42 else 16


def _sixteen_bits(image: Image.Image, data: bytes | bytearray) -> Array:
    """uint16 (H, W, C) of an image that PIL reads at 8 bits only: its high bytes, then its low ones."""
    low: Any = Image.open(io.BytesIO(data))
    low.tile = [part._replace(args=_other_byte(part.args)) for part in low.tile]
    return np.asarray(image).astype(np.uint16) << 8 | np.asarray(low)


def _other_byte(args: Any) -> Any:
    mode = _raw_mode(args)
    other = mode[:-1] + _LOW_BYTE[mode[-1]]
    return other if isinstance(args, str) else (other, *args[1:])


def _turned_back(samples: Samples, orientation: int) -> Samples:
    back = _TURN_BACK.get(orientation)
    if back is None:
        return samples
    fourth = None if samples.fourth is None else back(samples.fourth)
    return samples._replace(colour=np.stack([back(plane) for plane in samples.colour]), fourth=fourth)
