"""Several folders, lists of shards, or both, as one set of images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from fastmim.data.index import ImageIndex
from fastmim.data.order import Span


class SeveralIndex:
    """The images of several indices, one after the other."""

    def __init__(self, parts: Sequence[ImageIndex]) -> None:
        self.parts = tuple(parts)
        self.root = ", ".join(part.root for part in parts)
        self._first = np.cumsum([0] + [len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._first[-1])

    def _at(self, index: int) -> tuple[ImageIndex, int]:
        part = int(np.searchsorted(self._first, index, side="right")) - 1
        return self.parts[part], index - int(self._first[part])

    def name(self, index: int) -> bytes:
        """The name of image `index` below the root of its part, as bytes."""
        part, inside = self._at(index)
        return part.name(inside)

    def label(self, index: int) -> str:
        """The name of image `index`, safe to print and to write as UTF-8."""
        part, inside = self._at(index)
        return part.label(inside)

    def read(self, index: int) -> bytearray:
        """The encoded bytes of image `index`; DecodeError when they cannot be read."""
        part, inside = self._at(index)
        return part.read(inside)

    @property
    def fingerprint(self) -> str:
        """Hex digest of those of the parts and their order."""
        return hashlib.sha256("".join(part.fingerprint for part in self.parts).encode()).hexdigest()


def weighted_spans(index: ImageIndex, weights: Sequence[float] | None) -> list[Span] | None:
    """The spans of the parts with their weights; None without weights.

    Raises:
        ValueError: not one positive weight for each of several parts.
    """
    if weights is None:
        return None
    parts = index.parts if isinstance(index, SeveralIndex) else (index,)
    if len(parts) < 2 or len(weights) != len(parts) or not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(
            f"data.weights={list(weights)}: give one positive number for each of the folders of data.path=[a, b, ...]"
            f" (here {len(parts)}), or null"
        )
    counts = [len(part) for part in parts]
    starts = np.cumsum([0, *counts])[:-1].tolist()
    return [Span(start, count, float(weight)) for start, count, weight in zip(starts, counts, weights, strict=True)]
