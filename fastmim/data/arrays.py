"""Samples as they are stored, of any number of bands: TIFF by tifffile, ``.npy`` and ``.npz`` by NumPy.

Sizes come from headers, and are judged before memory is taken for what they promise. Nothing is unpickled.
"""

from __future__ import annotations

import functools
import io
import logging
import math
import warnings
import zipfile
from typing import Any, BinaryIO

import numpy as np

from fastmim.data import tiff
from fastmim.data.samples import UnusableError
from fastmim.wording import first_line, install_extra, plural

NPY, NPZ = b"\x93NUMPY", (b"PK\x03\x04", b"PK\x05\x06")
#: Samples above which an image is refused: of four bands, those of the largest image that is read at all.
MAX_SAMPLES = 4 * 2 * 89_478_485
_MAX_PAGES = 4096
_GREATEST = 8  # bytes of a sample
Array = np.ndarray[Any, Any]


class _AsWarning(logging.Handler):
    """What tifffile says of a file in its log becomes a warning, which is told with the file's name (``notes.py``)."""

    def emit(self, record: logging.LogRecord) -> None:
        warnings.warn(record.getMessage(), stacklevel=2)


@functools.cache
def _tifffile() -> Any:
    """tifffile, imported with the first TIFF: kernels are tested on machines that have torch and little else."""
    import tifffile

    log = logging.getLogger("tifffile")
    log.propagate = False
    log.addHandler(_AsWarning(logging.WARNING))
    return tifffile


def is_stored(data: bytes | bytearray) -> bool:
    """Whether the bytes are of a kind that :func:`stored_bands` reads."""
    return data.startswith((*tiff.MAGIC, NPY, *NPZ))


def stored_bands(
    data: bytes | bytearray, *, in_chans: int, array: str | None = None, channel_order: str = "auto"
) -> Array:
    """The samples of a TIFF, an ``.npy`` or an ``.npz``, in the file's own type.

    The bands of a TIFF are the samples of its one page; or its pages, each of one sample a pixel and of one size, taken
    as an array (pages, rows, columns). Reduced copies and masks among the pages are passed over.

    Args:
        in_chans: bands that there must be.
        array: which array of an ``.npz``; None: the only one.
        channel_order: the axis of the bands of an array of three, "first" or "last"; "auto": that of length `in_chans`.

    Returns:
        (in_chans, H, W), of integers or floats.

    Raises:
        UnusableError: it has other bands, is of another type, too large or damaged; the reason, in one line.
    """
    try:
        if data.startswith(tiff.MAGIC):
            values, settled = _tiff(data)
        else:
            values, settled = _npz(data, array) if data.startswith(NPZ) else _npy(io.BytesIO(data)), False
    except UnusableError:
        raise
    except Exception as err:  # tifffile, NumPy and zipfile meet damaged files with whatever Python raises
        raise UnusableError(_reason(err)) from None
    return _bands_first(values, in_chans, "first" if settled else channel_order)


def stated_no_data(data: bytes | bytearray) -> str | None:
    """The value that GDAL has noted in a TIFF as that of no data; None without one."""
    if not data.startswith(tiff.MAGIC):
        return None
    try:
        with warnings.catch_warnings(), _tifffile().TiffFile(io.BytesIO(data)) as file:
            warnings.simplefilter("ignore")  # told of where the image is read
            tag = file.pages.first.tags.get(tiff.GDAL_NO_DATA)
            return None if tag is None else str(tag.value).strip("\0 ")[:40]
    except Exception:  # as in :func:`stored_bands`, where it is said
        return None


def _bands_first(values: Array, in_chans: int, order: str) -> Array:
    shape = "x".join(map(str, values.shape))
    if values.ndim == 2:
        values, order = values[None], "first"
    if values.ndim != 3 or not values.size:
        raise UnusableError(f"array of shape {shape}: must be rows x columns, with an axis of bands first or last")
    if order == "auto":
        first, last = values.shape[0] == in_chans, values.shape[2] == in_chans
        if first and last:
            fix = "give data.channel_order=first or last"
            raise UnusableError(f"array of shape {shape}: either axis may be the bands; {fix}")
        if not first and not last:
            where = "neither its first nor its last axis"
            raise UnusableError(f"array of shape {shape}: {where} is model.in_chans={in_chans}")
        order = "last" if last else "first"
    if order == "last":
        values = values.transpose(2, 0, 1)
    if len(values) != in_chans:
        raise UnusableError(f"has {plural(len(values), 'band')}, and model.in_chans={in_chans}")
    return values


def _tiff(data: bytes | bytearray) -> tuple[Array, bool]:
    """The samples, and whether the file itself says that the bands are first."""
    with _tifffile().TiffFile(io.BytesIO(data)) as file:
        whole = _pages(file)
        first = whole[0]
        if len({page.shape for page in whole}) > 1:
            sizes = ", ".join(dict.fromkeys("x".join(map(str, page.shape)) for page in whole[:5]))
            raise UnusableError(f"{len(whole)} pages of different sizes ({sizes})")
        if len(whole) > 1 and first.samplesperpixel > 1:
            rule = "bands are in one page, or one a page"
            raise UnusableError(f"{len(whole)} pages of {first.samplesperpixel} bands each: {rule}")
        _check_samples(math.prod(first.shape) * len(whole))
        # In this thread: a worker's others would outlive what it answers.
        planes = [page.asarray(maxworkers=1) for page in whole]
    if len(planes) > 1:
        return np.stack(planes), False
    return (planes[0].transpose(2, 0, 1) if first.axes == "YXS" else planes[0]), True


def _pages(file: Any) -> list[Any]:
    """Those of a TiffFile in full size that are no masks."""
    pages: list[Any] = []
    places: set[int] = set()
    for page in file.pages:
        if page.offset in places or len(pages) == _MAX_PAGES:
            raise UnusableError(f"damaged TIFF: its pages lead back to one of them, or are more than {_MAX_PAGES}")
        places.add(page.offset)
        pages.append(page)
    whole = [page for page in pages if not (page.is_reduced or page.is_mask)]
    if not whole:
        raise UnusableError("damaged TIFF: it has no page of an image in full size")
    for page in whole:
        _check_page(page)
    return whole


def _check_page(page: Any) -> None:
    if page.axes not in ("YX", "YXS", "SYX") or 0 in page.shape:
        what = f"{page.axes or 'none'} of {'x'.join(map(str, page.shape)) or 'no'} samples"
        raise UnusableError(f"TIFF with axes {what}: must be rows and columns, with or without bands")
    _check_type(page.dtype)
    # Else each of the millions of tiles that a damaged header may promise is looked for.
    there, wanted = len(page.dataoffsets), math.prod(page.chunked)
    if there != wanted:
        raise UnusableError(f"damaged TIFF: {there} of {wanted} strips or tiles")


def _npz(data: bytes | bytearray, array: str | None) -> Array:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [name for name in archive.namelist() if name.endswith(".npy")]
        shown = ", ".join(ascii(name[:-4])[1:-1][:40] for name in names[:8]) or "none"
        if array is None and len(names) != 1:
            raise UnusableError(f"holds {len(names)} arrays ({shown}); say which with data.array")
        wanted = names[0] if array is None else f"{array}.npy"
        if wanted not in names:
            raise UnusableError(f"has no array named data.array={array} (there: {shown})")
        with archive.open(wanted) as member:
            return _npy(member)


def _npy(file: Any) -> Array:
    shape, fortran, dtype = _header(file)
    _check_type(dtype)
    count = math.prod(shape)
    if min(shape, default=1) < 1:
        raise UnusableError(f"array of shape {shape}: must be rows x columns, with an axis of bands first or last")
    _check_samples(count)
    raw = file.read(count * dtype.itemsize)
    # The byte behind it is asked for too: a zip's checksum is compared at its end.
    if len(raw) < count * dtype.itemsize or file.read(1):
        raise UnusableError(f"damaged: the array's bytes do not make {'x'.join(map(str, shape))} of {dtype}")
    values = np.frombuffer(raw, dtype)
    return values.reshape(shape[::-1]).transpose() if fortran else values.reshape(shape)


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, whether in Fortran's order, type) of an .npy file, of which the position is then behind its header."""
    version = np.lib.format.read_magic(file)
    read: Any = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise UnusableError(f"an .npy of version {version}: 1.0 and 2.0 are read")
    return read(file)


def _check_type(dtype: np.dtype[Any] | None) -> None:
    if dtype is None or dtype.kind not in "iuf" or dtype.itemsize > _GREATEST:
        raise UnusableError(f"samples of type {str(dtype)[:60]}: must be integers or floats of 8 to 64 bits")


def _check_samples(count: int) -> None:
    if count > MAX_SAMPLES:
        raise UnusableError(f"{count} samples are more than {MAX_SAMPLES} (decompression bomb?)")


def _reason(err: Exception) -> str:
    line = first_line(err)
    if "imagecodecs" in line or isinstance(err, ImportError):
        return f"{line}: {install_extra('bands')}"
    return f"damaged, or not a kind that is read: {line}"
