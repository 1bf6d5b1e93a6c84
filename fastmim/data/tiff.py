"""What a TIFF says of its samples (TIFF 6.0), and how PIL is brought to give all of them."""

from __future__ import annotations

import io
import struct
from typing import Any, NamedTuple

from PIL import TiffImagePlugin

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
WIDTH, BITS, PHOTOMETRIC, ORIENTATION, BANDS, PLANAR, EXTRA, FORMAT = 256, 258, 262, 274, 277, 284, 338, 339
GDAL_NO_DATA = 42113  # text
UNSPECIFIED, PREMULTIPLIED, ALPHA = 0, 1, 2  # values of EXTRA
SIGNED, SEPARATE = 2, 2  # of FORMAT, of PLANAR
_TYPES = {1: "uint", 2: "int", 3: "float", 5: "complex int", 6: "complex"}
_GREY, _RGB = 1, 2  # of PHOTOMETRIC
_SHORT = 3
_NOT_READ = (
    "not a kind that is read; save 1, 3 or 4 interleaved bands of uint8 or uint16, or 1 of float32, or read samples as"
    " they are stored with data.pixels=float32"
)


def not_read(data: bytes | bytearray) -> str | None:
    """Why a TIFF is refused, by its tags; None where they cannot be read."""
    if data.startswith(b"MM\0+"):
        return f"BigTIFF in big-endian byte order: {_NOT_READ}"
    found = _described(data) if data.startswith(MAGIC) else None
    if found is None:
        return None
    count, kinds, planes = found
    bits = "/".join(dict.fromkeys(f"{''.join(filter(str.isdigit, kind))}-bit" for kind in kinds))
    samples = f"{count} {'/'.join(kinds)} sample{'s' * (count > 1)} a pixel ({bits}{', in planes' * planes})"
    return f"TIFF with {samples}: {_NOT_READ}"


def _described(data: bytes | bytearray) -> tuple[int, list[str], bool] | None:
    """(samples a pixel, their types without repeats, whether each of several bands lies by itself)."""
    file = io.BytesIO(data)
    big = data[2:4] in (b"+\0", b"\0+")
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(16 if big else 8))
        file.seek(tags.next)
        tags.load(file)
        if WIDTH not in tags:
            return None
        count, bits = int(tags.get(BANDS, 1)), tags.get(BITS, (1,))
        forms = tags.get(FORMAT, (1,))
        named = [f"{_TYPES.get(form, 'undefined ')}{bit}" for bit, form in zip(bits, forms * len(bits), strict=False)]
        return count, list(dict.fromkeys(named)), count > 1 and tags.get(PLANAR, 1) == SEPARATE
    except Exception:  # PIL's reader meets damaged files with whatever Python raises
        return None


def orientation(data: bytes | bytearray) -> int:
    """The value of the orientation tag, 1 without one."""
    try:
        return _Tags(data).number(ORIENTATION) or 1
    except struct.error:
        return 1


class _Entry(NamedTuple):
    """Where one tag lies in the file."""

    start: int
    kind: int
    number: int  # of values
    value: int  # place of its value, or of the pointer to it


def for_pil(data: bytes | bytearray) -> tuple[bytes | bytearray, int | None]:
    """The same TIFF with tags of which PIL gives all samples as they are stored, and what it called its extra sample.

    PIL reads over an unspecified extra sample and divides by a premultiplied one: both are called plain alpha here. It
    refuses 3 or 4 bands that are called grey and extra ones, as GDAL writes them: the first three are called colours
    here. Anything else is given back as it is.
    """
    if not data.startswith(MAGIC):
        return data, None
    try:
        return _Tags(bytearray(data)).changed()
    except struct.error:  # its reader will refuse it
        return data, None


class _Tags:
    """The entries of the first directory; those of a bytearray can be changed in place."""

    def __init__(self, data: bytes | bytearray) -> None:
        self.data: Any = data
        self.order = "<" if data.startswith(b"II") else ">"
        self.big = self._at("H", 2) == 43
        self.long = "Q" if self.big else "I"
        self.first = self._at(self.long, 8 if self.big else 4)
        self.total = self._at("Q" if self.big else "H", self.first)
        self.entries: dict[int, _Entry] = {}
        place, self.width = self.first + (8 if self.big else 2), 20 if self.big else 12
        for start in range(place, min(place + self.total * self.width, len(data)), self.width):
            tag, kind, count = struct.unpack_from(self.order + ("HHQ" if self.big else "HHI"), data, start)
            self.entries[tag] = _Entry(start, kind, count, start + (12 if self.big else 8))

    def _at(self, code: str, place: int) -> int:
        value: int = struct.unpack_from(self.order + code, self.data, place)[0]
        return value

    def number(self, tag: int) -> int | None:
        """The first value of a tag of 16-bit numbers; None where there is no such tag."""
        entry = self.entries.get(tag)
        return None if entry is None or entry.kind != _SHORT else self._at("H", entry.value)

    def changed(self) -> tuple[bytearray, int | None]:
        """See :func:`for_pil`."""
        extra, bands = self.entries.get(EXTRA), self.number(BANDS)
        if extra is None or extra.kind != _SHORT:
            return self.data, None
        if self.number(PHOTOMETRIC) == _GREY and bands in (3, 4) and extra.number == bands - 1:
            self._put("H", self.entries[PHOTOMETRIC].value, _RGB)
            if bands == 3:
                self._remove(extra)
                return self.data, None
        elif extra.number != 1:
            return self.data, None
        is_inside = 2 * extra.number <= (8 if self.big else 4)
        values = extra.value if is_inside else self._at(self.long, extra.value)
        kind = self._at("H", values + 2 * (extra.number - 1))
        self._put(self.long, extra.start + 4, 1)
        self._put("H", extra.value, ALPHA)
        return self.data, kind

    def _put(self, code: str, place: int, value: int) -> None:
        struct.pack_into(self.order + code, self.data, place, value)

    def _remove(self, entry: _Entry) -> None:
        """Entries behind it, and the link to the next directory, move up."""
        end = self.first + (8 if self.big else 2) + self.total * self.width + (8 if self.big else 4)
        rest = bytes(self.data[entry.start + self.width : end])
        self.data[entry.start : entry.start + len(rest)] = rest
        self._put("Q" if self.big else "H", self.first, self.total - 1)
