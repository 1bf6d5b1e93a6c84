"""Labelled images for probes: listed, their classes read, some held out, and all of them read in one pass."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastmim.data.augment import View
from fastmim.data.build import build_loader
from fastmim.data.held_out import PartIndex, places
from fastmim.data.index import ImageIndex
from fastmim.data.labels import UNLABELLED, hold_out, read_labels
from fastmim.data.names import printable
from fastmim.data.several import SeveralIndex
from fastmim.data.source import open_index
from fastmim.wording import plural

_LOG = logging.getLogger("fastmim")
#: Shorter edge of the scaled image over that of the crop: 256 for 224.
MARGIN = 256 / 224
HELD_OUT = 0.2
_SPLITS = ("train", "val")
_SCALE = (0.08, 1.0)
Path = str | os.PathLike[str]


class LabelledImages:
    """Images with classes, some for training a classifier and the others to try it on.

    Args:
        path: class folders, or shards with ``.cls`` members; or a folder with ``train`` and ``val``, each of these.
        val: those to try it on, of the same kind; None: ``val`` in `path`, else a fifth of each class, by a hash of
            the names.
        table: CSV of file,class (:func:`fastmim.data.labels.read_labels`).
        most: use so many of the images, evenly spread; None: all.
        field: what messages about `path` name.
        opening: further arguments of :func:`~fastmim.data.source.open_index`.

    Attributes:
        classes: names.
        labels: int64 (N,) on the CPU, of every image.
        held_out: bool (N,), those to try it on.

    Raises:
        ValueError: a folder is missing or empty, classes cannot be told, or there is nothing on one side.
    """

    def __init__(
        self,
        path: Path,
        val: Path | None = None,
        *,
        table: Path | None = None,
        most: int | None = None,
        field: str = "DIR",
        **opening: Any,
    ) -> None:
        paths = _both(path) if val is None else [path, val]
        parts = [open_index(one, field=field, **opening) for one in paths]
        index = parts[0] if len(parts) == 1 else SeveralIndex(parts)
        found = read_labels(index, table, field)
        if len(parts) == 1:
            held_out = hold_out(found.numbers, places(index), HELD_OUT)
        else:
            held_out = np.arange(len(index)) >= len(parts[0])
        kept = np.flatnonzero(found.numbers != UNLABELLED)
        if most is not None and most < len(kept):
            kept = kept[np.linspace(0, len(kept) - 1, most).astype(np.int64)]
        self.index, self.classes = PartIndex(index, kept), found.classes
        self.labels, self.held_out = torch.from_numpy(found.numbers[kept]), torch.from_numpy(held_out[kept])
        self._check(f"{field}={printable(os.fspath(path))}")

    def _check(self, where: str) -> None:
        own, tried = self.labels[~self.held_out], self.labels[self.held_out]
        if not len(tried):
            raise ValueError(f"{where}: no class has two images, one of them to try it on; give a folder val of others")
        if not len(own):
            raise ValueError(f"{where}: no image is left to learn from")
        lost = ~torch.isin(tried, own)
        if lost.any():
            names = plural(len(tried[lost].unique()), "class", "classes")
            what = f"{plural(int(lost.sum()), 'image')} of {names} without a training image"
            _LOG.warning("%s: %s count as wrong", where, what)

    def loader(self, size: tuple[int, int], *, augmented: bool = False, **arguments: Any) -> Any:
        """A loader of all images in their order, resized to 256/224 of the crop (bicubic) and cropped in the middle.

        Args:
            size: (H, W) of the crop.
            augmented: of those to learn from alone, in any order: random crops of 8 to 100 % and flips; the last
                batch is left out where it is not full.
            arguments: of :func:`~fastmim.data.build.build_loader`.
        """
        index = PartIndex(self.index, np.flatnonzero(~self.held_out.numpy())) if augmented else self.index
        return frozen_loader(index, size, train=augmented, **arguments)


def frozen_loader(index: ImageIndex, size: tuple[int, int], *, train: bool = False, **arguments: Any) -> Any:
    """A loader for a frozen encoder: all images in their order, resized to 256/224 of the crop and cut in the middle.

    Args:
        index: the images.
        size: (H, W) of the crop.
        train: random crops and flips in any order instead.
        arguments: of :func:`~fastmim.data.build.build_loader`.
    """
    view = View(size, scale=_SCALE, interpolation="bicubic", margin=MARGIN)
    return build_loader(index=index, img_size=size, views=[view], verify="none", train=train, **arguments)


def _both(path: Path) -> Sequence[Path]:
    """The folders train and val in it, or itself."""
    inside = [os.path.join(path, name) for name in _SPLITS]
    return inside if all(map(os.path.isdir, inside)) else [path]
