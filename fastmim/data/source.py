"""Which files there are, in which order, and which of them are broken.

The index lists every file, good or bad, in an order that depends on the file names only. Bad files *stay* in
the index and the loader puts another file in their place, so neither verification nor the moment at which a
bad file is found changes a batch.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from fastmim.data import shards
from fastmim.data.decode import DecodeError, decode_image, read_bytes
from fastmim.data.each_file import each_file
from fastmim.data.index import ImageIndex
from fastmim.data.names import printable, shown
from fastmim.data.scan import scan_folder
from fastmim.data.several import SeveralIndex
from fastmim.data.worker_error import MACHINE_ERRORS
from fastmim.wording import plural

VERIFY = ("auto", "full", "none")
#: `verify="auto"` decodes every file up front when there are at most this many.
VERIFY_AUTO_LIMIT = 2000

_LOG = logging.getLogger("fastmim")
_NOTES_LOGGED = 20


class FileIndex:
    """An immutable, ordered list of files under one root.

    Names are kept as one bytes object and one offset array: forked workers share those pages, while a list of
    millions of str would be copied into each of them by reference counting.
    """

    def __init__(self, root: str, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.root = root
        self._blob = b"".join(encoded)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, index: int) -> bytes:
        """The name of file `index` below the root, as bytes."""
        start = int(self._ends[index - 1]) if index else 0
        return self._blob[start : int(self._ends[index])]

    def path(self, index: int) -> str:
        """The path of file `index`, for open()."""
        return os.path.join(self.root, os.fsdecode(self.name(index)))

    def label(self, index: int) -> str:
        """The path of file `index`, safe to print and to write as UTF-8 whatever bytes the name holds."""
        return printable(self.path(index))

    def read(self, index: int) -> bytearray:
        """The bytes of file `index`; DecodeError when it cannot be read."""
        return read_image_file(self.path(index))

    @property
    def fingerprint(self) -> str:
        """Hex digest of names and order: equal exactly when two runs see the same index (root aside)."""
        return hashlib.sha256(self._ends.tobytes() + self._blob).hexdigest()


def open_index(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None,
    file_list: str | os.PathLike[str] | None = None,
    *,
    follow_links: bool = False,
    component: str | None = None,
    pixels: str = "uint8",
    field: str = "data.path",
) -> ImageIndex:
    """List the images of a folder (recursive, sorted by name as bytes), a file list (in its own order) or shards.

    `path` means shards when it is a folder with .tar files, a .tar file or a pattern of them: see ``shards.py``.
    Several paths are one set of images, in their order. What is left out of a folder: see ``scan.py``.

    Args:
        follow_links: follow linked folders, each once, and links that lead out of `path`.
        component: which member of a sample of a shard is the image; see :func:`fastmim.data.shards.open_shards`.
        pixels: the run's ``data.pixels``; float32 counts .npy and .npz as images.
        field: the config key that messages name.

    Raises:
        ValueError: folder or list missing or without images; a list entry outside `path` or not a file.
    """
    if path is not None and not isinstance(path, (str, os.PathLike)):
        if not path or (file_list is not None and len(path) > 1):
            raise ValueError(f"{field}={list(path)}: give one folder or more; with data.file_list one")
        if len(path) == 1:
            path = path[0]
        else:
            _tell_of_overlaps([os.fspath(one) for one in path], field)
            return SeveralIndex([_open_one(one, follow_links, component, pixels, field) for one in path])
    if file_list is not None:
        return _index_from_list(path, os.fspath(file_list))
    if path is None:
        raise ValueError(f"{field}=null: give a folder of images, for example {field}=/path/to/images")
    return _open_one(path, follow_links, component, pixels, field)


def check_path(path: str, field: str) -> None:
    """That there is something at a path for :func:`open_index`, which is not looked into.

    Raises:
        ValueError: there is nothing, or a file that is no shard.
    """
    if not os.path.isdir(path) and not shards.find_tars(path, field):
        _existing_folder(path, field)


def _open_one(
    path: str | os.PathLike[str], follow_links: bool, component: str | None, pixels: str, field: str
) -> ImageIndex:
    tars = shards.find_tars(os.fspath(path), field, pixels)
    if tars:
        return shards.open_shards(os.fspath(path), tars, field, component, pixels)
    root = _existing_folder(os.fspath(path), field)
    return FileIndex(root, scan_folder(root, field, follow_links, pixels))


def overlaps(paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(inner, outer), printable, for every two of the folders of which one lies in the other, or is the other."""
    real = [os.path.realpath(path) for path in paths]
    for first, second in itertools.permutations(range(len(paths)), 2):
        is_same = real[first] == real[second] and first > second
        if is_same or real[first].startswith(os.path.join(real[second], "")):
            yield printable(paths[first]), printable(paths[second])


def _tell_of_overlaps(paths: Sequence[str], field: str) -> None:
    for inner, outer in overlaps(paths):
        _LOG.warning("%s: what is in %s is in %s too: its images are in the set twice", field, inner, outer)


def _index_from_list(path: str | os.PathLike[str] | None, file_list: str) -> FileIndex:
    if not os.path.isfile(file_list):
        raise ValueError(f"data.file_list={printable(file_list)}: no such file; give a text file, one path a line")
    root = _existing_folder(os.fspath(path) if path is not None else os.path.dirname(file_list) or ".", "data.path")
    with open(file_list, encoding="utf-8-sig", errors="surrogateescape") as lines:
        names = [_inside(root, line.strip(), file_list, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not names:
        raise ValueError(f"data.file_list={printable(file_list)}: the list is empty; write one path a line")
    missing = [name for name in names if not os.path.isfile(os.path.join(root, name))]
    if missing:
        entries = plural(len(names), "entry", "entries")
        raise ValueError(
            f"data.file_list={printable(file_list)}: {len(missing)} of {entries} not a file"
            f" under {printable(root)} ({shown(missing)})"
        )
    return FileIndex(root, names)


def _inside(root: str, entry: str, file_list: str, number: int) -> str:
    name = os.path.relpath(os.path.join(root, entry), root)
    if name == os.pardir or name.startswith(os.path.join(os.pardir, "")):
        raise ValueError(
            f"data.file_list={printable(file_list)} line {number}: {printable(entry)} lies outside"
            f" data.path={printable(root)}; set data.path to a folder that holds it"
        )
    return name


def _existing_folder(root: str, field: str) -> str:
    if not os.path.isdir(root):
        kind = "is a file, not a folder" if os.path.exists(root) else "no such folder"
        raise ValueError(f"{field}={printable(root)}: {kind}; give a folder of images")
    return root


def read_image_file(path: str) -> bytearray:
    """The bytes of a file; DecodeError when it cannot be read, OSError when the machine, not the file, is to blame."""
    try:
        with open(path, "rb", buffering=0) as file:
            return read_bytes(file, os.fstat(file.fileno()).st_size)
    except OSError as err:
        if err.errno in MACHINE_ERRORS:
            raise
        raise DecodeError(f"cannot be read: {err.strerror or err}") from None


def find_bad_files(
    index: ImageIndex,
    *,
    verify: str = "full",
    min_size: int = 8,
    num_workers: int | None = None,
    **reading: Any,
) -> dict[int, str]:
    """Decode every file in full and return {file index: reason} of those that cannot be used.

    `verify`: "full" always; "auto" only for at most `VERIFY_AUTO_LIMIT` files; "none" never (bad files are
    then found by the loader as it meets them). Files are decoded in `num_workers` processes: one that a decoder crashes
    is replaced, and its file is bad. `reading`: how, as :func:`decode_image` takes it.

    Raises:
        DataWorkerError: the processes cannot go on.
    """
    if verify not in VERIFY:
        raise ValueError(f"data.verify={verify!r}: unknown; use one of {', '.join(VERIFY)}")
    if verify == "none" or (verify == "auto" and len(index) > VERIFY_AUTO_LIMIT):
        return {}

    if len(index) > VERIFY_AUTO_LIMIT:
        _LOG.info("data.verify=%s: decoding %d files once", verify, len(index))

    def decode(file: int) -> None:
        decode_image(index.read(file), min_size=min_size, **reading)

    found = each_file(index, range(len(index)), decode, num_workers)
    log_notes({index.label(i): said for i, said in found.notes.items()})
    return dict(sorted(found.bad.items()))


def log_notes(notes: dict[str, str]) -> None:
    """Name the images {path: warning} that are used although their decoder warned; the first of them only."""
    for label, said in list(notes.items())[:_NOTES_LOGGED]:
        _LOG.warning("image used as its decoder gives it: %s: %s", label, said)
    if len(notes) > _NOTES_LOGGED:
        _LOG.warning("%d images in all are used as their decoder gives them", len(notes))


def check_bad_fraction(bad: dict[str, str], num_images: int, max_bad_fraction: float) -> None:
    """Raise ValueError when more than `max_bad_fraction` of the files, or all of them, cannot be used."""
    if not bad or (len(bad) <= max_bad_fraction * num_images and len(bad) < num_images):
        return
    names = shown([f"{path}: {reason}" for path, reason in bad.items()])
    advice = "none is left" if len(bad) >= num_images else "remove them or raise data.max_bad_fraction"
    raise ValueError(
        f"data.max_bad_fraction={max_bad_fraction:g}: {len(bad)} of {plural(num_images, 'file')}"
        f" cannot be used ({names}); {advice}"
    )
