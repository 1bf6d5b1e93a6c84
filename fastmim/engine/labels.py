"""The classes of images, for an objective that learns them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastmim.data.labels import UNLABELLED, read_labels
from fastmim.data.source import open_index
from fastmim.wording import plural


def find_classes(path: Any, file_list: str | None, table: str | None, **opening: Any) -> tuple[str, ...]:
    """The names of the classes of ``data.path``.

    Args:
        path, file_list, opening: Arguments of :func:`~fastmim.data.source.open_index`.
        table: ``data.labels``.

    Raises:
        ValueError: No classes can be told.
    """
    return read_labels(open_index(path, file_list, **opening), table, "data.path").classes


def give_labels(
    objective: Any, classes: tuple[str, ...], loader: Any, val_loader: Any, *, table: str | None, held_out: str
) -> None:
    """Hand the objective the class of every file of both loaders.

    Args:
        objective: One that takes labels.
        classes: Their names, by number.
        loader, val_loader: Of the files trained on, and of those held out, or None.
        table: ``data.labels``, of the images of ``data.path``.
        held_out: The config's key of those held out; images of ``data.val_path`` are in class folders of their own.

    Raises:
        ValueError: A file has no class, or one that is not among ``classes``.
    """
    numbers = [_numbers(loader, table, "data.path", classes)]
    if val_loader is not None:
        own = None if held_out == "data.val_path" else table
        numbers.append(_numbers(val_loader, own, held_out, classes))
    objective.give_labels(*(torch.from_numpy(one) for one in numbers))


def _numbers(loader: Any, table: str | None, field: str, classes: tuple[str, ...]) -> np.ndarray[Any, Any]:
    numbers = read_labels(loader.index, table, field, classes).numbers
    lacking = int((numbers == UNLABELLED).sum())
    if lacking:
        images = plural(lacking, "image")
        raise ValueError(
            f"{field}: {images} without a class; give each one, or name those that have one in data.file_list"
        )
    return numbers
