"""What the loader does to the values of these images, said before training: a range not used, alpha, a fourth band."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from fastmim.data.arrays import stated_no_data
from fastmim.data.decode import DecodeError, plain_jpeg, read_samples
from fastmim.data.each_file import each_file
from fastmim.data.index import ImageIndex
from fastmim.data.names import printable, shown
from fastmim.data.samples import Samples
from fastmim.wording import plural

#: Images looked at before training, spread evenly over the index.
LOOKED_AT = 64
_LOG = logging.getLogger("fastmim")
_UNUSED = 4  # a range is not used when no value passes this part of it
_CLIPPED = 0.5


class Look(NamedTuple):
    """What one image holds."""

    label: str
    bits: int
    is_whole: bool  # integers, none below zero
    low: float
    high: float
    own_range: bool
    clipped: float  # share of the samples outside the range
    transparent: bool
    has_band: bool  # fourth samples that are no alpha
    has_fourth: bool
    frames: int


def survey(
    index: ImageIndex,
    bad: dict[int, str],
    *,
    in_chans: int,
    loader: str = "auto",
    min_size: int = 1,
    value_range: Sequence[float] | None = None,
    alpha: str = "white",
    most: int = LOOKED_AT,
    num_workers: int | None = None,
    pixels: str = "uint8",
    no_data: float | str | None = None,
    **_: Any,
) -> list[str]:
    """Look at up to `most` images, and say in lines what a user would not expect of them.

    Files in `bad` are left out; one on which a decoder crashes is added to it. Others that cannot be read are passed
    over here: the loader names them when it meets them.
    """
    chosen = np.linspace(0, len(index) - 1, min(most, len(index))).astype(int).tolist()
    if pixels == "float32":
        return _on_no_data(index, [file for file in chosen if file not in bad]) if no_data is None else []

    def look(file: int) -> Look | None:
        try:
            data = index.read(file)
            if value_range is None and in_chans != 4 and plain_jpeg(data, min_size) is not None:
                return None
            samples = read_samples(data, in_chans=in_chans, loader=loader, min_size=min_size)
        except DecodeError:
            return None
        return _seen(index.label(file), samples, value_range, _frames(data))

    looked = each_file(index, [file for file in chosen if file not in bad], look, num_workers)
    bad |= looked.bad
    seen: list[Look] = [looked.values[file] for file in sorted(looked.values)]
    return [*_on_range(seen, value_range), *_on_channels(seen, in_chans, alpha)]


def _on_no_data(index: ImageIndex, files: Sequence[int]) -> list[str]:
    """Of samples that are taken as stored: what GDAL has noted as no data, and the run would learn as data."""
    stated: dict[str, list[str]] = {}
    for file in files:
        try:
            value = stated_no_data(index.read(file))
        except DecodeError:
            continue
        if value is not None:
            stated.setdefault(value, []).append(index.label(file))
    return [
        f"{len(names)} of the images looked at {'states' if len(names) == 1 else 'state'} {printable(value)} as the"
        f" value of no data; give data.no_data={printable(value)} to leave such samples out ({shown(names)})"
        for value, names in stated.items()
    ]


def warn(lines: Sequence[str]) -> None:
    """Log what a survey says."""
    for line in lines:
        _LOG.warning("%s", line)


def _seen(label: str, samples: Samples, value_range: Sequence[float] | None, frames: int) -> Look:
    colour, fourth = samples.colour, samples.fourth
    low, high = value_range or (-np.inf, np.inf)
    return Look(
        label,
        bits=8 * colour.dtype.itemsize,
        is_whole=colour.dtype.kind == "u",
        low=float(colour.min()),
        high=float(colour.max()),
        own_range=samples.own_range,
        clipped=0.0 if value_range is None else float(((colour < low) | (colour > high)).mean()),
        transparent=fourth is not None and samples.is_alpha and bool((fourth < np.iinfo(fourth.dtype).max).any()),
        has_band=fourth is not None and not samples.is_alpha,
        has_fourth=fourth is not None,
        frames=frames,
    )


def _frames(data: bytes | bytearray) -> int:
    if data.startswith((b"\xff\xd8", b"\x89PNG")):
        return 1
    try:
        return int(getattr(Image.open(io.BytesIO(data)), "n_frames", 1))
    except Exception:  # the image itself is known to be good: what follows it is not needed
        return 1


def _on_range(seen: Sequence[Look], value_range: Sequence[float] | None) -> list[str]:
    if value_range is None:
        deep = [one for one in seen if one.bits == 16 and one.is_whole and not one.own_range]
        dark = [one for one in deep if one.high * _UNUSED < 65535]
        if not dark or 2 * len(dark) < len(deep):  # a few may be dark pictures
            return []
        high = max(one.high for one in dark)
        end, apart = 2 ** max(8, int(high).bit_length()) - 1, " and keep the others apart" * (len(dark) < len(deep))
        some = f"{len(dark)} of {plural(len(deep), 'such image')} looked at"
        return [
            f"the 16-bit samples of {some} end at {high:g} of 65535: only {int(high) // 256 + 1} of 256 levels"
            f" are left; give data.value_range=[0, {end}]{apart} ({_names(dark)})"
        ]
    ranged = [one for one in seen if not one.own_range]
    low, end = value_range
    high = max((one.high for one in ranged), default=end)
    lines = []
    if high < low + (end - low) / _UNUSED:
        lines.append(
            f"the samples of the {plural(len(ranged), 'image')} looked at end at {high:g}, and use less than a quarter"
            f" of data.value_range=[{low:g}, {end:g}]; give the range that they have"
        )
    clipped = [one for one in ranged if one.clipped > _CLIPPED]
    if clipped:
        lines.append(
            f"more than half of the samples of {len(clipped)} of {plural(len(ranged), 'image')} looked at lie outside"
            f" data.value_range=[{low:g}, {end:g}] and are clipped; give the range that they have ({_names(clipped)})"
        )
    return lines


def _on_channels(seen: Sequence[Look], in_chans: int, alpha: str) -> list[str]:
    lines = []

    def say(found: Sequence[Look], what: str) -> None:
        if found:
            have = "has" if len(found) == 1 else "have"
            lines.append(f"{len(found)} of the images looked at {have} {what} ({_names(found)})")

    if in_chans == 4:
        say([one for one in seen if not one.has_fourth], "no fourth channel: it is 255 in every pixel")
    else:
        done = "dropped: what is under transparent pixels shows" if alpha == "drop" else f"laid over {alpha}"
        say([one for one in seen if one.transparent], f"transparent pixels, {done} (data.alpha={alpha})")
        band = "a band behind the colours, which is left out; model.in_chans=4 keeps it"
        say([one for one in seen if one.has_band], band)
    say([one for one in seen if one.frames > 1], "several frames or pages, of which only the first is used")
    return lines


def _names(found: Sequence[Look]) -> str:
    return shown([one.label for one in found])
