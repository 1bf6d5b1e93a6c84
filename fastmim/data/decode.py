"""Image bytes to (C, H, W) tensors, uint8 or normalised float32, or one clear reason why not.

JPEG and PNG go through ``torchvision.io``; everything else, and whatever torchvision refuses, through PIL. libpng only
gets files that are written here from checked data (``png.py``). Pixels are those stored: an orientation (EXIF's or
TIFF's) is applied where `exif_orientation` asks for it alone. What deep samples, alpha and a fourth band become in 8
bits is said in ``samples.py``; samples that keep their values are read by ``arrays.py`` and finished by ``floats.py``.

A damaged file is bad when the decoder cannot give the image; what libjpeg gives with a warning is used, and the warning
is told with the file's name (``notes.py``). Decoders differ about damaged JPEGs: torchvision's verdict, wherever it is
asked (``data.verify``, ``fastmim data check``), binds every loader; DALI, where it is not, may use some more of them.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmim.data import png, tiff
from fastmim.data.arrays import is_stored, stored_bands
from fastmim.data.floats import all_bands, to_floats
from fastmim.data.orientation import orientation_of, upright
from fastmim.data.plugins import open_image
from fastmim.data.reading import check_reading
from fastmim.data.reasons import why_unidentified
from fastmim.data.samples import (
    Samples,
    UnusableError,
    pil_samples,
    to_pixels,
    transparent_where,
)
from fastmim.wording import first_line

try:
    from torchvision.io import ImageReadMode, decode_jpeg, decode_png
except ImportError:  # torchvision 0.29 announces that it will drop its decoders: PIL then does all the work
    _HAS_TORCHVISION = False
else:
    _HAS_TORCHVISION = True
    warnings.filterwarnings("ignore", "The image decoding and encoding capabilities", DeprecationWarning)

LOADERS = ("auto", "torchvision", "pil")
#: Images above this many pixels are refused before any memory is allocated for them (PIL's own error limit).
MAX_PIXELS = 2 * 89_478_485

CHANNELS = (1, 3, 4)
_JPEG_MAGIC = b"\xff\xd8\xff"
_JPEG_NOT_SOF = frozenset({0xC4, 0xC8, 0xCC})
_JPEG_EOI, _TRAILER = b"\xff\xd9", 64  # some writers pad behind the end-of-image marker
#: Adobe's APP14 segment may say that the three components are RGB or YCCK, which decoders treat differently.
_ADOBE, _ADOBE_WITHIN, _ADOBE_YCBCR = b"\xff\xee\x00\x0eAdobe", 1 << 16, b"\x01"
_JPEG_BARE = frozenset({0x01, *range(0xD0, 0xD9)})


class DecodeError(ValueError):
    """One image cannot be used; the message is the reason, in one line."""


def read_bytes(file: io.FileIO, size: int) -> bytearray:
    """The next ``size`` bytes of an unbuffered file, fewer where it ends before; OSError when it cannot be read."""
    data = bytearray(size)
    view, filled = memoryview(data), 0
    while filled < size and (count := file.readinto(view[filled:])):
        filled += count
    view.release()
    del data[filled:]
    return data


def decode_image(
    data: bytes | bytearray,
    *,
    in_chans: int = 3,
    loader: str = "auto",
    min_size: int = 1,
    value_range: Sequence[float] | None = None,
    alpha: str = "white",
    pixels: str = "uint8",
    no_data: float | str | None = None,
    exif_orientation: bool = False,
    array: str | None = None,
    channel_order: str = "auto",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Decode one image.

    Args:
        data: the bytes of the file.
        in_chans: 1 (grey), 3 (RGB) or 4 (RGBA, or RGB and another band; 255 where the file has no fourth samples).
            With pixels="float32" the number of the file's bands, whatever that is.
        loader: "torchvision" (JPEG and PNG only, no fall-back), "pil", or "auto" (torchvision, then PIL).
        min_size: images with a side below this many pixels are refused.
        value_range, alpha: see :func:`fastmim.data.samples.to_pixels`.
        pixels: "float32" keeps the samples as stored, also of arrays (``.npy``, ``.npz``) and TIFFs of many bands.
        array, channel_order: of these, see :func:`fastmim.data.arrays.stored_bands`.
        no_data, mean, std: of these samples, see :func:`fastmim.data.floats.to_floats`; not used for uint8.
        exif_orientation: turn the image as its EXIF or TIFF orientation says.

    Returns:
        tensor (in_chans, H, W), uint8, or float32 with NaN for no data.

    Raises:
        DecodeError: with a one-line reason, for any image that cannot be used in full.
        ValueError: for arguments that do not go together.
    """
    own = dict(value_range=value_range, alpha=alpha, no_data=no_data, array=array, channel_order=channel_order)
    check_decode_options(in_chans, loader, pixels, **own)
    how: dict[str, Any] = dict(in_chans=in_chans, loader=loader, min_size=min_size)
    try:
        if pixels == "float32":
            values = _all_bands(data, array, channel_order, **how)
            image = torch.from_numpy(to_floats(values, no_data=no_data, mean=mean, std=std))
        else:
            image = to_pixels(read_samples(data, **how), in_chans=in_chans, value_range=value_range, alpha=alpha)
    except UnusableError as err:
        raise DecodeError(str(err)) from None
    return upright(image, orientation_of(data)) if exif_orientation else image


def _all_bands(data: bytes | bytearray, array: str | None, channel_order: str, **how: Any) -> np.ndarray[Any, Any]:
    """(in_chans, H, W) of samples as they are stored."""
    if not is_stored(data):
        return all_bands(read_samples(data, **how), how["in_chans"])
    values = stored_bands(data, in_chans=how["in_chans"], array=array, channel_order=channel_order)
    _check_size(values.shape[1:], how["min_size"])
    return values


def read_samples(data: bytes | bytearray, *, in_chans: int, loader: str, min_size: int) -> Samples:
    """The samples of one image as they are stored; a JPEG, and a PNG without alpha, in grey where `in_chans` is 1.

    Raises:
        DecodeError: as :func:`decode_image`.
    """
    if not data:
        raise DecodeError("empty file")
    is_jpeg, is_png = data.startswith(_JPEG_MAGIC), data.startswith(png.MAGIC)
    if is_jpeg or is_png:
        _check_size(_jpeg_size(data) if is_jpeg else png.size_of(data), min_size)
    if is_png:
        data = _checked_png(data)
    if loader != "pil" and _HAS_TORCHVISION and (is_jpeg or is_png):
        try:
            samples = _decode_torchvision(data, in_chans, is_jpeg)
        except RuntimeError as err:
            # PIL would fill the missing part with grey where the process sets LOAD_TRUNCATED_IMAGES.
            if loader == "torchvision" or "truncated" in str(err):
                raise DecodeError(_torchvision_reason(err)) from None
        else:
            _check_size(samples.colour.shape[1:], min_size)
            return samples
    elif loader == "torchvision":
        raise DecodeError(f"not a JPEG or PNG ({_head(data)}); data.loader=auto reads more formats")
    return _decode_pil(data, min_size)


def check_decode_options(in_chans: int, loader: str, pixels: str = "uint8", **own: Any) -> None:
    """Raise ValueError for channels or a loader that there are not, or what ``check_reading`` says of the others."""
    check_reading(pixels=pixels, **own)
    if pixels == "uint8" and in_chans not in CHANNELS:
        raise ValueError(
            f"model.in_chans={in_chans}: image files give 1 (grey), 3 (RGB) or 4 (RGBA) channels of 8 bits; set"
            " data.pixels=float32 for other bands"
        )
    if loader not in LOADERS:
        raise ValueError(f"data.loader={loader!r}: unknown; use one of {', '.join(LOADERS)}")
    if loader == "torchvision" and not _HAS_TORCHVISION:
        raise ValueError("data.loader=torchvision: this torchvision has no image decoders; use auto or pil")


def _decode_torchvision(data: bytes | bytearray, in_chans: int, is_jpeg: bool) -> Samples:
    # frombuffer wants a writable buffer; the loader hands in bytearrays, which are not copied.
    buffer = torch.frombuffer(data if isinstance(data, bytearray) else bytearray(data), dtype=torch.uint8)
    if is_jpeg:
        mode = ImageReadMode.GRAY if in_chans == 1 else ImageReadMode.RGB
        return Samples(decode_jpeg(buffer, mode=mode).numpy())
    kind = png.kind_of(data)
    modes = {
        (True, False): ImageReadMode.GRAY,
        (True, True): ImageReadMode.GRAY_ALPHA,
        (False, False): ImageReadMode.RGB,
        (False, True): ImageReadMode.RGB_ALPHA,
    }
    is_grey = kind.is_grey or (in_chans == 1 and not kind.has_alpha and kind.key is None)
    planes = decode_png(buffer, mode=modes[is_grey, kind.has_alpha]).numpy()
    if kind.has_alpha:
        return Samples(planes[:-1], planes[-1], True)
    if kind.key is not None:
        return Samples(planes, transparent_where(planes, kind.key), True)
    return Samples(planes)


def _decode_pil(data: bytes | bytearray, min_size: int) -> Samples:
    try:
        data, extra = tiff.for_pil(data)
        image = open_image(data)
        _check_size((image.height, image.width), min_size)
        return pil_samples(image, data, extra)
    except DecodeError:
        raise
    except Image.UnidentifiedImageError:
        raise DecodeError(why_unidentified(data)) from None
    except Exception as err:  # PIL's plugins raise OSError, SyntaxError, ValueError, struct.error, …
        raise DecodeError(first_line(err)) from None


def _check_size(size: tuple[int, ...] | None, min_size: int) -> None:
    if size is None:
        return
    height, width = size
    if height * width > MAX_PIXELS:
        raise DecodeError(f"{width}x{height} px is more than {MAX_PIXELS} px (decompression bomb?)")
    if min(height, width) < min_size:
        raise DecodeError(f"{width}x{height} px is smaller than data.min_size={min_size}")


def _checked_png(data: bytes | bytearray) -> bytearray:
    try:
        return png.checked_png(data)
    except ValueError as err:
        raise DecodeError(str(err)) from None


def _jpeg_size(data: bytes | bytearray) -> tuple[int, int] | None:
    frame = jpeg_frame(data)
    return frame and (frame.height, frame.width)


class JpegFrame(NamedTuple):
    """What the start-of-frame segment of a JPEG says."""

    height: int
    width: int
    components: int
    precision: int  # bits per sample


def plain_jpeg(data: bytes | bytearray, min_size: int) -> JpegFrame | None:
    """The frame of a whole 8-bit grey or YCbCr JPEG, which every decoder reads alike; None for anything else.

    Looks at the header and the end only: data that is corrupt in the middle passes.

    Raises:
        DecodeError: empty, or its size is out of bounds.
    """
    if not data:
        raise DecodeError("empty file")
    frame = jpeg_frame(data) if data.startswith(_JPEG_MAGIC) else None
    if frame is None or frame.components not in (1, 3) or frame.precision != 8 or _JPEG_EOI not in data[-_TRAILER:]:
        return None
    _check_size((frame.height, frame.width), min_size)
    adobe = data.find(_ADOBE, 0, _ADOBE_WITHIN)
    return frame if adobe < 0 or data[adobe + 15 : adobe + 16] == _ADOBE_YCBCR else None


def jpeg_frame(data: bytes | bytearray) -> JpegFrame | None:
    """The first start-of-frame segment (ITU T.81, B.2.2), None when there is none."""
    pos = 2
    while pos + 9 <= len(data) and data[pos] == 0xFF:
        marker = data[pos + 1]
        if marker == 0xFF:  # fill byte
            pos += 1
        elif marker in _JPEG_BARE:
            pos += 2
        elif 0xC0 <= marker <= 0xCF and marker not in _JPEG_NOT_SOF:
            height, width = data[pos + 5 : pos + 7], data[pos + 7 : pos + 9]
            components = data[pos + 9] if pos + 9 < len(data) else 0
            return JpegFrame(int.from_bytes(height, "big"), int.from_bytes(width, "big"), components, data[pos + 4])
        else:
            pos += 2 + int.from_bytes(data[pos + 2 : pos + 4], "big")
    return None


def _torchvision_reason(err: RuntimeError) -> str:
    # torchvision reports "operator(), /build/path/decode_png.cpp:79, reason": the place is noise to a user.
    return first_line(err).split(".cpp:")[-1].partition(", ")[2] or first_line(err)


def _head(data: bytes | bytearray) -> str:
    return f"it starts with {bytes(data[:12])!r}"
