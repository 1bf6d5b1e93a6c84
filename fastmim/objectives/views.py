"""The images that an objective wants of the loader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Images = Tensor | tuple[Tensor, ...]
"""(B, C, H, W) uint8, or normalised float; of several crops one (count, B, C, h, w) a :class:`View`."""


@dataclass(frozen=True)
class View:
    """``count`` crops of one kind that the loader makes of every image; None: as the data section says."""

    size: tuple[int, int]
    count: int = 1
    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] | None = None
    hflip: float | None = None
    interpolation: str | None = None

    def over(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """The loader's arguments: what is given here over ``defaults``."""
        return {**defaults, **{key: value for key, value in vars(self).items() if value is not None}}
