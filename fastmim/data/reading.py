"""The keys of the data section that say how an image is read: one list, for a run and for whatever reads as it does."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

#: What becomes of a file: arguments of ``decode_image`` and of ``build_loader``.
KEYS = (
    *("min_size", "value_range", "alpha", "pixels", "no_data", "exif_orientation", "array", "channel_order"),
    *("mean", "std"),
)
#: Which files there are: arguments of ``open_index`` and of ``build_loader``.
OPENING = ("follow_links", "component", "pixels")

#: Beside :data:`KEYS`, what a loader of a frozen encoder's images takes of a data section.
FROZEN = ("num_workers", "max_bad_fraction")

PIXELS = ("uint8", "float32")
ALPHA = ("white", "black", "drop")
ORDERS = ("auto", "first", "last")
#: Keys that mean something with these pixels alone, and their value with the others.
_ONLY: dict[str, dict[str, Any]] = {
    "uint8": {"value_range": None, "alpha": "white"},
    "float32": {"no_data": None, "array": None, "channel_order": "auto"},
}
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}")


def reading_of(section: Any, *more: str) -> dict[str, Any]:
    """:data:`KEYS`, and `more`, of a data section."""
    return {key: getattr(section, key) for key in (*KEYS, *more)}


def opening_of(section: Any) -> dict[str, Any]:
    """:data:`OPENING` of a data section."""
    return {key: getattr(section, key) for key in OPENING}


def checked(reading: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some :data:`KEYS` for :func:`check_reading`; TypeError where others are among them."""
    if unknown := sorted(set(reading) - set(KEYS)):
        raise TypeError(f"unknown arguments: {', '.join(unknown)}")
    return {key: reading[key] for key in ("pixels", *_ONLY["uint8"], *_ONLY["float32"]) if key in reading}


def check_reading(
    *,
    pixels: str = "uint8",
    value_range: Sequence[float] | None = None,
    alpha: str = "white",
    no_data: float | str | None = None,
    array: str | None = None,
    channel_order: str = "auto",
) -> None:
    """Raise ValueError, in one line that names the key of the data section, for values that are not taken together."""
    if pixels not in PIXELS:
        raise ValueError(f"data.pixels={pixels!r}: unknown; use one of {', '.join(PIXELS)}")
    if value_range is not None and not (
        len(value_range) == 2 and all(map(math.isfinite, value_range)) and value_range[0] < value_range[1]
    ):
        raise ValueError(
            f"data.value_range={list(value_range)}: must be [low, high] with low < high, for example [0, 4095]"
        )
    background(alpha)
    if channel_order not in ORDERS:
        raise ValueError(f"data.channel_order={channel_order!r}: unknown; use one of {', '.join(ORDERS)}")
    if no_data is not None and no_data != "nan" and not (isinstance(no_data, (int, float)) and math.isfinite(no_data)):
        raise ValueError(f"data.no_data={no_data}: must be a number, nan or null")
    given: dict[str, Any] = {"value_range": value_range, "alpha": alpha}
    given |= {"no_data": no_data, "array": array, "channel_order": channel_order}
    (other,) = (one for one in PIXELS if one != pixels)
    for key, default in _ONLY[other].items():
        if given[key] != default:
            shown = list(given[key]) if key == "value_range" else given[key]
            fix = f"set data.pixels={other}, or data.{key}={'null' if default is None else default}"
            raise ValueError(f"data.{key}={shown}: not with data.pixels={pixels}; {fix}")


def background(alpha: str) -> tuple[int, int, int] | None:
    """Red, green and blue, 0 to 255, of what ``data.alpha`` puts under transparent pixels; None: nothing.

    Raises:
        ValueError: neither one of :data:`ALPHA` nor ``#rrggbb``.
    """
    if alpha in ALPHA:
        return {"white": (255, 255, 255), "black": (0, 0, 0)}.get(alpha)
    if not _COLOUR.fullmatch(alpha):
        raise ValueError(f'data.alpha={alpha}: expected one of {", ".join(ALPHA)}, or a colour such as "#8040ff"')
    return int(alpha[1:3], 16), int(alpha[3:5], 16), int(alpha[5:7], 16)
