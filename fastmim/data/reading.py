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

PIXELS = ("uint8", "float32")
ALPHA = ("white", "black", "drop")
ORDERS = ("auto", "first", "last")
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}")


#: Beside :data:`KEYS`, what a loader of a frozen encoder's images takes of a data section.
FROZEN = ("num_workers", "max_bad_fraction")
#: Those that have a rule: arguments of :func:`check_reading`.
_WITH_RULES = ("pixels", "value_range", "alpha", "no_data", "array", "channel_order")


def reading_of(section: Any, *more: str) -> dict[str, Any]:
    """:data:`KEYS`, and `more`, of a data section."""
    return {key: getattr(section, key) for key in (*KEYS, *more)}


def opening_of(section: Any) -> dict[str, Any]:
    """:data:`OPENING` of a data section."""
    return {key: getattr(section, key) for key in OPENING}


def checked(reading: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some keys for :func:`check_reading`."""
    return {key: reading[key] for key in _WITH_RULES if key in reading}


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
        shown = list(value_range)
        raise ValueError(f"data.value_range={shown}: must be [low, high] with low < high, for example [0, 4095]")
    background(alpha)
    if channel_order not in ORDERS:
        raise ValueError(f"data.channel_order={channel_order!r}: unknown; use one of {', '.join(ORDERS)}")
    if no_data is not None and no_data != "nan" and not (isinstance(no_data, (int, float)) and math.isfinite(no_data)):
        raise ValueError(f"data.no_data={no_data}: must be a number, nan or null")
    if pixels == "float32":
        for key, value in {"value_range": value_range, "alpha": None if alpha == "white" else alpha}.items():
            if value is not None:
                shown_value = value if isinstance(value, str) else list(value)
                raise ValueError(
                    f"data.{key}={shown_value}: not with data.pixels=float32, which takes samples as stored; leave it"
                    " out, or use data.pixels=uint8"
                )
        return
    for key, value, default in (("no_data", no_data, None), ("array", array, None), ("channel_order", channel_order,
                                "auto")):  # fmt: skip
        if value != default:
            raise ValueError(f"data.{key}={value}: needs data.pixels=float32; set that, or leave {key} out")


def background(alpha: str) -> tuple[int, int, int] | None:
    """Red, green and blue, 0 to 255, of what ``data.alpha`` puts under transparent pixels; None: nothing.

    Raises:
        ValueError: neither one of :data:`ALPHA` nor ``#rrggbb``.
    """
    if alpha in ALPHA:
        return {"white": (255, 255, 255), "black": (0, 0, 0)}.get(alpha)
    if not _COLOUR.fullmatch(alpha):
        raise ValueError(f"data.alpha={alpha}: expected one of {', '.join(ALPHA)}, or a colour such as \"#8040ff\"")
    return int(alpha[1:3], 16), int(alpha[3:5], 16), int(alpha[5:7], 16)
