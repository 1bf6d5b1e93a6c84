"""Mean and standard deviation of every band of a set of images, in one pass and in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastmim.data.decode import decode_image
from fastmim.data.each_file import some_at_a_time
from fastmim.data.index import ImageIndex
from fastmim.data.source import check_bad_fraction

Array = np.ndarray[Any, Any]


@dataclass
class Moments:
    """Of every band: samples so far, their mean, and the sum of the squares of their distances from it.

    Two sets are joined as Chan, Golub and LeVeque (1979) do it, which loses no digits where a mean is far from 0.
    """

    count: Array  # (C,) float64
    mean: Array
    squares: Array

    @classmethod
    def of(cls, image: Array) -> Moments:
        """Those of (C, H, W); NaN is no sample."""
        bands = image.reshape(len(image), -1).astype(np.float64)
        there = ~np.isnan(bands)
        count = there.sum(1).astype(np.float64)
        mean = np.where(there, bands, 0).sum(1) / np.maximum(count, 1)
        return cls(count, mean, np.where(there, (bands - mean[:, None]) ** 2, 0).sum(1))

    def add(self, other: Moments) -> None:
        """Join another set to this one."""
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        apart = other.mean - self.mean
        self.squares += other.squares + apart**2 * self.count * share
        self.mean += apart * share
        self.count = count


@dataclass(frozen=True)
class Statistics:
    """What was found: of every band mean, standard deviation (of the population) and share of samples that are data."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    data: tuple[float, ...]
    images: int
    bad: dict[str, str] = field(default_factory=dict)  # {path: reason} of files left out


def measure(
    index: ImageIndex,
    *,
    in_chans: int,
    pixels: str = "uint8",
    max_bad_fraction: float = 0.5,
    num_workers: int | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    **reading: Any,
) -> Statistics:
    """The statistics of all samples of all images as a run reads them: no crop, every pixel once.

    Args:
        index: the images.
        in_chans: their bands.
        pixels: "uint8": values are those of the 8 bits over 255; "float32": the samples as stored.
        max_bad_fraction: see :func:`~fastmim.data.build_loader`.
        progress: told of the stage, the files so far, and their number.
        reading: further arguments of :func:`~fastmim.data.decode.decode_image`, but for ``mean`` and ``std``.

    Raises:
        ValueError: too many files cannot be used; or a band is constant, or nowhere data.
    """

    def look(file: int) -> tuple[Array, Array, Array, int]:
        image = decode_image(index.read(file), in_chans=in_chans, pixels=pixels, **reading)
        found = Moments.of(image.numpy())
        return found.count, found.mean, found.squares, image[0].numel()

    whole, images, total, done = Moments(*(np.zeros(in_chans) for _ in range(3))), 0, 0, 0
    bad: dict[str, str] = {}
    for outcome in some_at_a_time(index, range(len(index)), look, num_workers):
        for *found, size in outcome.values.values():
            whole.add(Moments(*found))
            images, total = images + 1, total + size
        bad |= {index.label(file): reason for file, reason in outcome.bad.items()}
        done += len(outcome.values) + len(outcome.bad)
        progress("statistics", done, len(index))
    check_bad_fraction(bad, len(index), max_bad_fraction)
    unit = 255.0 if pixels == "uint8" else 1.0
    std = [math.sqrt(square / max(count, 1)) / unit for square, count in zip(whole.squares, whole.count, strict=True)]
    for band, (count, one) in enumerate(zip(whole.count, std, strict=True)):
        if not one:
            what = f"is {whole.mean[band]:g} everywhere" if count else "is nowhere data"
            raise ValueError(f"{index.root}: band {band} of {in_chans} {what}, and has no std; leave it out")
    mean = tuple((whole.mean / unit).tolist())
    return Statistics(mean, tuple(std), tuple((whole.count / max(total, 1)).tolist()), images, bad)
