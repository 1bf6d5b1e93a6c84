"""Images that are named one by one: files, folders and shards in any mixture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from fastmim.data.index import ImageIndex
from fastmim.data.several import SeveralIndex
from fastmim.data.source import FileIndex, open_index

_SHARD = ".tar"


def open_given(paths: Sequence[str | os.PathLike[str]], *, field: str = "IMAGES", **opening: Any) -> ImageIndex:
    """One list of the images at these paths, in their order.

    Args:
        paths: image files, folders, or shards.
        field: what messages name.
        opening: further arguments of :func:`~fastmim.data.source.open_index`.

    Raises:
        ValueError: nothing is there, or no image.
    """
    parts = [_open(os.fspath(path), field, opening) for path in paths]
    if not parts:
        raise ValueError(f"{field}: give at least one image, folder or shard")
    return parts[0] if len(parts) == 1 else SeveralIndex(parts)


def _open(path: str, field: str, opening: dict[str, Any]) -> ImageIndex:
    if os.path.isfile(path) and not path.endswith(_SHARD):
        folder, name = os.path.split(path)
        return FileIndex(folder or ".", [name])
    return open_index(path, field=field, **opening)
