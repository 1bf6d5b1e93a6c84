"""The classes of images, for an objective that learns them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastmim.data.held_out import PartIndex
from fastmim.data.index import ImageIndex
from fastmim.data.labels import Labels, read_labels
from fastmim.data.several import SeveralIndex
from fastmim.data.source import open_index
from fastmim.wording import plural


@dataclass(frozen=True)
class Labelled:
    """The images of ``data.path``, listed once, and their classes; nothing where no labels are needed."""

    index: ImageIndex | None = None
    labels: Labels | None = None
    several: bool = False

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names, by number."""
        return () if self.labels is None else self.labels.classes


def find_labels(path: Any, file_list: str | None, table: str | None, *, several: bool, **opening: Any) -> Labelled:
    """The images of ``data.path`` and their classes.

    Args:
        path, file_list, opening: Arguments of :func:`~fastmim.data.source.open_index`.
        table: ``data.labels``.
        several: An image may have several classes.

    Raises:
        ValueError: No classes can be told, or an image has none.
    """
    index = open_index(path, file_list, **opening)
    return Labelled(index, _whole(read_labels(index, table, "data.path", several=several), "data.path"), several)


def give_labels(objective: Any, found: Labelled, loader: Any, val_loader: Any, *, table: str | None) -> None:
    """Hand the objective the classes of every file of both loaders.

    Args:
        objective: One that takes labels.
        found: Of ``data.path``.
        loader, val_loader: Of the files trained on, and of those held out of them, or of ``data.val_path``, or None.
        table: ``data.val_labels``.

    Raises:
        ValueError: A file has no class, or one that is not among those trained on.
    """
    assert found.index is not None and found.labels is not None
    numbers = [part_of(found.labels.numbers, found.index, loader.index)]
    if val_loader is not None:
        own = part_of(found.labels.numbers, found.index, val_loader.index)
        if own is None:
            how: dict[str, Any] = {"key": "data.val_labels", "several": found.several}
            read = read_labels(val_loader.index, table, "data.val_path", found.classes, **how)
            own = _whole(read, "data.val_path").numbers
        numbers.append(own)
    objective.give_labels(*(torch.from_numpy(one) for one in numbers))


def _whole(labels: Labels, field: str) -> Labels:
    if labels.lacking:
        images = plural(labels.lacking, "image")
        raise ValueError(
            f"{field}: {images} without a class; give each one, or name those that have one in data.file_list"
        )
    return labels


def part_of(rows: np.ndarray, whole: ImageIndex, part: ImageIndex) -> np.ndarray | None:
    """The rows of the images of ``part``, of those of ``whole``; None where it is no part of it.

    Args:
        rows: One for each image of ``whole``.
        whole, part: The second is the first, or what :func:`fastmim.data.held_out.split` has made of it.
    """
    if part is whole:
        return rows
    if isinstance(part, PartIndex):
        return rows[part.numbers] if part.whole is whole else None
    if not (isinstance(part, SeveralIndex) and isinstance(whole, SeveralIndex)):
        return None
    ends = np.cumsum([len(one) for one in whole.parts])
    own = {id(one): rows[end - len(one) : end] for one, end in zip(whole.parts, ends, strict=True)}
    found = [one for one in part.parts if isinstance(one, PartIndex) and id(one.whole) in own]
    if len(found) < len(part.parts):
        return None
    return np.concatenate([own[id(one.whole)][one.numbers] for one in found])
