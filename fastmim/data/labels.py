"""The class of every image of an index: its folder, a table of files, or the ``.cls`` members of shards."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastmim.data import shards
from fastmim.data.decode import DecodeError
from fastmim.data.held_out import PartIndex
from fastmim.data.index import ImageIndex
from fastmim.data.names import printable, shown
from fastmim.data.several import SeveralIndex
from fastmim.data.tar_index import sample_key
from fastmim.wording import plural

_LOG = logging.getLogger("fastmim")
#: Of an image that has none.
UNLABELLED = -1
CLASS_COMPONENT = "cls"


@dataclass(frozen=True)
class Labels:
    """Classes by number.

    Attributes:
        classes: their names, printable, in the order of the names' bytes (numbers in that of the numbers).
        numbers: int64 (N,), of every image of the index its class, or UNLABELLED; where an image may have several
            classes int8 (N, classes), 1 for each of them and else 0, or UNLABELLED in all places.
    """

    classes: tuple[str, ...]
    numbers: np.ndarray

    @property
    def lacking(self) -> int:
        """How many images the table does not name."""
        return int((self.numbers.reshape(len(self.numbers), -1)[:, :1] == UNLABELLED).sum())


def read_labels(
    index: ImageIndex,
    table: str | os.PathLike[str] | None = None,
    field: str = "DIR",
    classes: Sequence[str] | None = None,
    *,
    key: str = "data.labels",
    several: bool = False,
) -> Labels:
    """The classes of an index of one folder, of shards, of several of these, which share their classes, or of a part.

    Args:
        index: as :func:`fastmim.data.source.open_index` gives it.
        table: a CSV file with lines ``file,class``: file as below its folder (of shards ``shard.tar!member``), for
            every image that has a class. None: of a folder the first folder below it is the class, of shards the
            ``.cls`` member of a sample.
        field: what messages about the images name.
        classes: names of another set's, which these numbers shall be of; None: those that are found.
        key: what messages about the table name.
        several: lines are ``file,class;class``: an image has any number of classes, none for ``file,``.

    Raises:
        ValueError: a class is none of ``classes``; an image has no class folder or ``.cls`` member; the table is
            missing, malformed, names a file that is not there or one twice; there are fewer than two classes.
    """
    found: list[Names]
    if table is None:
        found = [None if name is None else (name,) for name in _of_index(index, field)]
    else:
        found = _from_table(index, table, f"{key}={printable(os.fspath(table))}", several)
    where = f"{field}={printable(index.root)}"
    if classes is not None:
        return Labels(tuple(classes), _known(found, classes, where, several))
    distinct = sorted({name for names in found for name in names or ()}, key=_in_order)
    if len(distinct) < 2:
        what = f"one class alone ({printable(os.fsdecode(distinct[0]))})" if distinct else "no class"
        raise ValueError(f"{where}: {what}; two folders of images, or more, are needed")
    left_out = sum(names is None for names in found)
    if left_out:
        _LOG.warning("%s: %s without a class left out", field, plural(left_out, "image"))
    numbers = _numbered(found, {name: i for i, name in enumerate(distinct)}, several)
    return Labels(tuple(printable(os.fsdecode(name)) for name in distinct), numbers)


Names = tuple[bytes, ...] | None
"""Of an image its classes, None where nothing is said of it."""


def _numbered(found: Sequence[Sequence[Any] | None], number: Mapping[Any, int], several: bool) -> np.ndarray:
    """``numbers`` of :class:`Labels`."""
    if not several:
        return np.array([UNLABELLED if names is None else number[names[0]] for names in found], dtype=np.int64)
    table = np.zeros((len(found), len(number)), dtype=np.int8)
    for row, names in zip(table, found, strict=True):
        row[slice(None) if names is None else [number[name] for name in names]] = UNLABELLED if names is None else 1
    return table


def _of_index(index: ImageIndex, field: str) -> list[bytes | None]:
    if isinstance(index, SeveralIndex):
        return [one for part in index.parts for one in _of_index(part, field)]
    if isinstance(index, PartIndex):
        whole = _of_index(index.whole, field)
        return [whole[number] for number in index.numbers]
    return _of_part(index, field)


def _known(found: list[Names], classes: Sequence[str], where: str, several: bool) -> np.ndarray:
    number = {name: i for i, name in enumerate(classes)}
    printed = [None if names is None else tuple(printable(os.fsdecode(n)) for n in names) for names in found]
    unknown = sorted({name for names in printed for name in names or () if name not in number})
    if unknown:
        raise ValueError(f"{where}: {plural(len(unknown), 'class', 'classes')} not among those trained on"
                         f" ({shown(unknown)}); take them out, or add images of them to both")  # fmt: skip
    return _numbered(printed, number, several)


def _in_order(name: bytes) -> tuple[int, bytes]:
    """Numbers by their value and before names."""
    return (int(name), b"") if name.isdigit() and len(name) < 19 else (1 << 62, name)


def _of_part(part: ImageIndex, field: str) -> list[bytes | None]:
    if isinstance(part, shards.ShardIndex):
        return _from_members(part, field)
    names = [part.name(i).split(os.sep.encode()) for i in range(len(part))]
    loose = [os.fsdecode(name[0]) for name in names if len(name) < 2]
    if loose:
        raise ValueError(
            f"{field}={printable(part.root)}: {plural(len(loose), 'image')} in no class folder ({shown(loose)}); put"
            " each class into a folder of its own, or give a CSV of file,class"
        )
    return [name[0] for name in names]


def _from_members(part: shards.ShardIndex, field: str) -> list[bytes | None]:
    tars = list(dict.fromkeys(part.shard(i) for i in range(len(part))))
    classes = shards.open_shards(part.root, tars, field, CLASS_COMPONENT)
    found: dict[str, bytes] = {}
    for i in range(len(classes)):
        try:
            found[_key(classes, i)] = bytes(classes.read(i)).strip()
        except DecodeError as error:
            raise ValueError(f"{field}: {classes.label(i)}: {error}") from None
    return [found.get(_key(part, i)) for i in range(len(part))]


def _key(index: shards.ShardIndex, i: int) -> str:
    return f"{index.shard(i)}!{sample_key(os.fsdecode(index.name(i)).partition('!')[2])}"


def _from_table(index: ImageIndex, table: str | os.PathLike[str], where: str, several: bool) -> list[Names]:
    """Of every image; names are looked for in each of several folders."""
    lines = _read_table(table, where, several)
    whole = index.whole if isinstance(index, PartIndex) else index
    there = set(_names(whole))
    unknown = [f"line {number}: {name}" for name, (number, _) in lines.items() if name not in there]
    if unknown:
        raise ValueError(f"{where}: {plural(len(unknown), 'file')} not among the images ({shown(unknown)})")
    return [lines[name][1] if name in lines else None for name in _names(index)]


def _names(index: ImageIndex) -> list[str]:
    if isinstance(index, SeveralIndex):
        return [name for part in index.parts for name in _names(part)]
    return [os.fsdecode(index.name(i)) for i in range(len(index))]


def _read_table(
    table: str | os.PathLike[str], where: str, several: bool
) -> dict[str, tuple[int, tuple[bytes, ...]]]:
    """Of each file its line and its classes."""
    form = "file,class;class" if several else "file,class"
    try:
        with open(table, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, row) for row in reader if row]
    except FileNotFoundError:
        raise ValueError(f"{where}: no such file; give a CSV of {form}") from None
    except (OSError, csv.Error) as error:
        raise ValueError(f"{where}: cannot be read: {error}") from None
    if rows and [cell.strip().lower() for cell in rows[0][1][:1]] == ["file"]:
        rows = rows[1:]
    found: dict[str, tuple[int, tuple[bytes, ...]]] = {}
    for number, row in rows:
        cells = [cell.strip() for cell in row]
        classes = [name.strip() for name in cells[-1].split(";")] if several and cells[-1] else cells[1:]
        known = len(cells) == 2 and cells[0] and (several and not cells[1] or all(classes))
        if not known:
            raise ValueError(f"{where} line {number}: must be {form}, got {printable(','.join(row))[:80]}")
        if len(set(classes)) < len(classes):
            raise ValueError(f"{where} line {number}: names a class twice: {printable(cells[1])[:80]}")
        names = tuple(os.fsencode(name) for name in classes if name)
        name = os.path.normpath(cells[0])
        before, same = found.setdefault(name, (number, names))
        if set(same) != set(names):
            other = "other classes" if several else "another class"
            raise ValueError(f"{where} line {number}: {printable(name)} has {other} above (line {before})")
    if not found:
        raise ValueError(f"{where}: is empty; write {form}, a line an image")
    return found


def hold_out(numbers: np.ndarray, places: np.ndarray, fraction: float) -> np.ndarray:
    """bool, of every image whether it is held out: of each class the share ``fraction`` with the lowest places.

    At least one of every class that has two images, and never all of them.

    Args:
        numbers: of :class:`Labels`.
        places: of :func:`fastmim.data.held_out.places`.
    """
    out = np.zeros(len(numbers), dtype=bool)
    for label in np.unique(numbers[numbers != UNLABELLED]):
        own = np.flatnonzero(numbers == label)
        count = min(max(1, round(fraction * len(own))), len(own) - 1)
        out[own[np.argsort(places[own], kind="stable")[:count]]] = True
    return out
