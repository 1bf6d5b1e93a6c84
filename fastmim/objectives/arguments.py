"""Rules of single arguments that several objectives have: each refuses a value in one line that names it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor


def at_least(argument: str, value: float, least: float) -> None:
    """Refuse a smaller value."""
    if value < least:
        raise ValueError(f"{argument}={value}: must be at least {least}")


def one_of(argument: str, value: Any, choices: Collection[str]) -> None:
    """Refuse a value that is not among the choices."""
    if value not in choices:
        raise ValueError(f"{argument}={value!r}: must be one of {', '.join(choices)}")


def no_colours(argument: str, value: Any, off: Any, pixels: str) -> None:
    """Refuse a change of colours that is not ``off`` where pixels are float."""
    if pixels == "float32" and value != off:
        value, off = (str(one).lower() if isinstance(one, bool) else one for one in (value, off))
        raise ValueError(f"{argument}={value}: changes colours, which data.pixels=float32 has not; use {off}")


def check_statistics(name: str, values: Sequence[float], pixels: str = "uint8") -> None:
    """Refuse a mean or std (`name`) that is not of values in [0, 1], or of float images not of a unit of their own."""
    if pixels == "uint8" and max(values) > 1:
        scaled = ", ".join(f"{value / 255:.4g}" for value in values)
        fix = f"; of values in 0 ... 255 these are [{scaled}]" if max(values) <= 255 else ""
        raise ValueError(f"{name}={list(values)}: must be of values in [0, 1]{fix}")
    if name == "std" and min(values) <= 0:
        raise ValueError(f"std={list(values)}: must be positive")
    if pixels == "uint8" and min(values) < 0:
        raise ValueError(f"{name}={list(values)}: must be of values in [0, 1], not negative")


def per_channel(
    name: str, values: Sequence[float] | None, imagenet: Sequence[float], in_chans: int, pixels: str
) -> Tensor:
    """(C, 1, 1) float32 of a mean or std (`name`), one value or one per channel; None: ImageNet's of RGB, else 0.5."""
    if values is None:
        values = imagenet if in_chans == 3 else (0.5,)
    if len(values) not in (1, in_chans):
        raise ValueError(f"{name}={tuple(values)}: must hold 1 value or one per channel ({in_chans})")
    check_statistics(name, values, pixels)
    return torch.tensor(values, dtype=torch.float32, device="cpu").expand(in_chans).reshape(in_chans, 1, 1).clone()
