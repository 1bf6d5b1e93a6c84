"""Which files there are, in which order, and which of them are broken.

The index lists every file, good or bad, in an order that depends on the file names only. Bad files *stay* in
the index and the loader puts another file in their place, so neither verification nor the moment at which a
bad file is found changes a batch.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Any, Protocol

import numpy as np

from fastmim.data import shards
from fastmim.data.decode import DecodeError, check_decode_options, decode_image, read_bytes
from fastmim.data.names import EXTENSIONS, is_image, printable, shown
from fastmim.data.notes import with_notes
from fastmim.data.pool import WorkerPool, nothing_held
from fastmim.data.worker_error import MACHINE_ERRORS

VERIFY = ("auto", "full", "none")
#: `verify="auto"` decodes every file up front when there are at most this many.
VERIFY_AUTO_LIMIT = 2000

_LOG = logging.getLogger("fastmim")
_CHUNK = 64
_NOTES_LOGGED = 20


class ImageIndex(Protocol):
    """An immutable, ordered list of images, wherever they lie; all methods may be called in worker processes."""

    root: str

    def __len__(self) -> int: ...

    def label(self, index: int) -> str:
        """The name of image `index`, safe to print and to write as UTF-8."""
        ...

    def read(self, index: int) -> bytearray:
        """The encoded bytes of image `index`; DecodeError when they cannot be read."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest of names and order."""
        ...


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

    def path(self, index: int) -> str:
        """The path of file `index`, for open()."""
        start = int(self._ends[index - 1]) if index else 0
        return os.path.join(self.root, os.fsdecode(self._blob[start : int(self._ends[index])]))

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
    path: str | os.PathLike[str] | None, file_list: str | os.PathLike[str] | None = None, *, field: str = "data.path"
) -> ImageIndex:
    """List the images of a folder (recursive, sorted by name as bytes), a file list (in its own order) or shards.

    `path` means shards when it is a folder with .tar files, a .tar file or a pattern of them: see ``shards.py``.

    Hidden files and folders are skipped; so are linked folders and links that lead out of `path`, with a
    warning. `field` is the config key that messages name.

    Raises:
        ValueError: folder or list missing or without images; a list entry outside `path` or not a file.
    """
    if file_list is not None:
        return _index_from_list(path, os.fspath(file_list))
    if path is None:
        raise ValueError(f"{field}=null: give a folder of images, for example {field}=/path/to/images")
    tars = shards.find_tars(os.fspath(path), field)
    if tars:
        return shards.open_shards(os.fspath(path), tars, field)
    root = _existing_folder(os.fspath(path), field)
    links: list[str] = []
    names = sorted(_walk(root, links), key=os.fsencode)
    if links:
        _LOG.warning("%s=%s: did not follow %d links: %s", field, printable(root), len(links), shown(links))
    if not names:
        raise ValueError(f"{field}={printable(root)}: no images here or below (looked for {' '.join(EXTENSIONS)})")
    return FileIndex(root, names)


def _walk(root: str, links: list[str]) -> Iterator[str]:
    inside = os.path.join(os.path.realpath(root), "")
    stack = [""]
    while stack:
        folder = stack.pop()
        try:
            entries = list(os.scandir(os.path.join(root, folder)))
        except OSError as err:
            _LOG.warning("cannot list %s (%s)", printable(os.path.join(root, folder)), err.strerror)
            continue
        for entry in entries:
            name = os.path.join(folder, entry.name)
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                stack.append(name)
            elif entry.is_symlink() and _leads_out(entry, inside):
                links.append(name)
            elif is_image(name) and entry.is_file():
                yield name


def _leads_out(entry: os.DirEntry[str], inside: str) -> bool:
    # A linked folder may form a loop or list images twice, so none is followed, wherever it leads.
    return entry.is_dir() or (is_image(entry.name) and not os.path.realpath(entry.path).startswith(inside))


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
        raise ValueError(
            f"data.file_list={printable(file_list)}: {len(missing)} of {len(names)} entries are not files"
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
    in_chans: int = 3,
    loader: str = "auto",
    min_size: int = 8,
    num_workers: int | None = None,
) -> dict[int, str]:
    """Decode every file in full and return {file index: reason} of those that cannot be used.

    `verify`: "full" always; "auto" only for at most `VERIFY_AUTO_LIMIT` files; "none" never (bad files are
    then found by the loader as it meets them). Files are decoded in `num_workers` processes: one that a decoder crashes
    is replaced, and its file is bad.

    Raises:
        DataWorkerError: the processes cannot go on.
    """
    if verify not in VERIFY:
        raise ValueError(f"data.verify={verify!r}: unknown; use one of {', '.join(VERIFY)}")
    if verify == "none" or (verify == "auto" and len(index) > VERIFY_AUTO_LIMIT):
        return {}

    if len(index) > VERIFY_AUTO_LIMIT:
        _LOG.info("data.verify=%s: decoding %d files once", verify, len(index))
    found: dict[int, str] = {}
    noted_files: dict[int, str] = {}
    workers = min(num_workers or min(8, os.cpu_count() or 1), len(index))
    check = _Check(index, dict(in_chans=in_chans, loader=loader, min_size=min_size))
    pool = WorkerPool(check, workers, ahead=2, label=index.label, crashed=found.__setitem__)
    chunk = max(1, min(_CHUNK, len(index) // (4 * workers)))
    parts = (range(start, min(start + chunk, len(index))) for start in range(0, len(index), chunk))
    with closing(pool):
        for bad, notes in pool.items(parts):
            found.update(bad)
            noted_files.update(notes)
    log_notes({index.label(i): said for i, said in noted_files.items()})
    return dict(sorted(found.items()))


def log_notes(notes: dict[str, str]) -> None:
    """Name the images {path: warning} that are used although their decoder warned; the first of them only."""
    for label, said in list(notes.items())[:_NOTES_LOGGED]:
        _LOG.warning("image used as its decoder gives it: %s: %s", label, said)
    if len(notes) > _NOTES_LOGGED:
        _LOG.warning("%d images in all are used as their decoder gives them", len(notes))


class _Check:
    """Decodes some files and keeps the reasons."""

    def __init__(self, index: ImageIndex, options: dict[str, Any]) -> None:
        self.index, self.options = index, options
        self.known_bad: frozenset[int] = frozenset()
        self.holding: Callable[[int], None] = nothing_held

    def __getitem__(self, files: range) -> tuple[dict[int, str], dict[int, str]]:
        bad: dict[int, str] = {}
        notes: dict[int, str] = {}
        for i in files:
            if i in self.known_bad:
                continue
            self.holding(i)
            try:
                _, said = with_notes(self._decode, i)
            except DecodeError as err:
                bad[i] = str(err)
            else:
                notes |= {i: "; ".join(said)} if said else {}
        return bad, notes

    def _decode(self, file: int) -> None:
        decode_image(self.index.read(file), **self.options)


def check_bad_fraction(bad: dict[str, str], num_images: int, max_bad_fraction: float) -> None:
    """Raise ValueError when more than `max_bad_fraction` of the files, or all of them, cannot be used."""
    if not bad or (len(bad) <= max_bad_fraction * num_images and len(bad) < num_images):
        return
    names = shown([f"{path}: {reason}" for path, reason in bad.items()])
    advice = "none is left" if len(bad) >= num_images else "remove them or raise data.max_bad_fraction"
    raise ValueError(
        f"data.max_bad_fraction={max_bad_fraction:g}: {len(bad)} of {num_images} files"
        f" cannot be used ({names}); {advice}"
    )


def check_images(
    path: str | os.PathLike[str] | None,
    *,
    file_list: str | os.PathLike[str] | None = None,
    in_chans: int = 3,
    loader: str = "auto",
    min_size: int = 8,
    num_workers: int | None = None,
) -> tuple[int, dict[str, str]]:
    """Decode every image of a folder or list; returns (number of usable files, {path: reason} of the others).

    Raises:
        ValueError: as `open_index`, or for an unknown `in_chans` or `loader`.
    """
    check_decode_options(in_chans, loader)
    index = open_index(path, file_list)
    bad = find_bad_files(index, in_chans=in_chans, loader=loader, min_size=min_size, num_workers=num_workers)
    return len(index) - len(bad), {index.label(i): reason for i, reason in bad.items()}
