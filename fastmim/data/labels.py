"""The class of every image of an index: its folder, a table of files, or the ``.cls`` members of shards."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

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
        numbers: int64, of every image of the index its class, or UNLABELLED.
    """

    classes: tuple[str, ...]
    numbers: np.ndarray


def read_labels(
    index: ImageIndex,
    table: str | os.PathLike[str] | None = None,
    field: str = "DIR",
    classes: Sequence[str] | None = None,
) -> Labels:
    """The classes of an index of one folder, of shards, of several of these, which share their classes, or of a part.

    Args:
        index: as :func:`fastmim.data.source.open_index` gives it.
        table: a CSV file with lines ``file,class``: file as below its folder (of shards ``shard.tar!member``), for
            every image that has a class. None: of a folder the first folder below it is the class, of shards the
            ``.cls`` member of a sample.
        field: what messages about the images name.
        classes: names of another set's, which these numbers shall be of; None: those that are found.

    Raises:
        ValueError: a class is none of ``classes``; an image has no class folder or ``.cls`` member; the table is
            missing, malformed, names a file that is not there or one twice; there are fewer than two classes.
    """
    names = _from_table(index, table) if table is not None else _of_index(index, field)
    if classes is not None:
        return _known(names, classes, f"{field}={printable(index.root)}")
    distinct = sorted({name for name in names if name is not None}, key=_in_order)
    if len(distinct) < 2:
        found = f"one class alone ({printable(os.fsdecode(distinct[0]))})" if distinct else "no class"
        raise ValueError(f"{field}={printable(index.root)}: {found}; two folders of images, or more, are needed")
    number = {name: i for i, name in enumerate(distinct)}
    left_out = sum(name is None for name in names)
    if left_out:
        _LOG.warning("%s: %s without a class left out", field, plural(left_out, "image"))
    numbers = np.array([UNLABELLED if name is None else number[name] for name in names], dtype=np.int64)
    return Labels(tuple(printable(os.fsdecode(name)) for name in distinct), numbers)


def _of_index(index: ImageIndex, field: str) -> list[bytes | None]:
    if isinstance(index, SeveralIndex):
        return [one for part in index.parts for one in _of_index(part, field)]
    if isinstance(index, PartIndex):
        whole = _of_index(index.whole, field)
        return [whole[number] for number in index.numbers]
    return _of_part(index, field)


def _known(names: list[bytes | None], classes: Sequence[str], where: str) -> Labels:
    number = {name: i for i, name in enumerate(classes)}
    printed = [None if name is None else printable(os.fsdecode(name)) for name in names]
    unknown = sorted({name for name in printed if name is not None and name not in number})
    if unknown:
        raise ValueError(f"{where}: {plural(len(unknown), 'class', 'classes')} not among those trained on"
                         f" ({shown(unknown)}); take them out, or add images of them to both")  # fmt: skip
    numbers = [UNLABELLED if name is None else number[name] for name in printed]
    return Labels(tuple(classes), np.array(numbers, dtype=np.int64))


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


def _from_table(index: ImageIndex, table: str | os.PathLike[str]) -> list[bytes | None]:
    """Of every image; names are looked for in each of several folders."""
    where = f"data.labels={printable(os.fspath(table))}"
    classes = _read_table(table, where)
    whole = index.whole if isinstance(index, PartIndex) else index
    unknown = sorted(classes.keys() - set(_names(whole)))
    if unknown:
        raise ValueError(f"{where}: {plural(len(unknown), 'file')} not among the images ({shown(unknown)})")
    return [os.fsencode(classes[name]) if name in classes else None for name in _names(index)]


def _names(index: ImageIndex) -> list[str]:
    if isinstance(index, SeveralIndex):
        return [name for part in index.parts for name in _names(part)]
    return [os.fsdecode(index.name(i)) for i in range(len(index))]


def _read_table(table: str | os.PathLike[str], where: str) -> dict[str, str]:
    try:
        with open(table, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = [(number, row) for number, row in enumerate(csv.reader(file), 1) if row]
    except FileNotFoundError:
        raise ValueError(f"{where}: no such file; give a CSV of file,class") from None
    except (OSError, csv.Error) as error:
        raise ValueError(f"{where}: cannot be read: {error}") from None
    if rows and [cell.strip().lower() for cell in rows[0][1][:1]] == ["file"]:
        rows = rows[1:]
    classes: dict[str, str] = {}
    for number, row in rows:
        cells = [cell.strip() for cell in row]
        if len(cells) != 2 or not all(cells):
            raise ValueError(f"{where} line {number}: must be file,class, got {printable(','.join(row))[:80]}")
        name = os.path.normpath(cells[0])
        if classes.setdefault(name, cells[1]) != cells[1]:
            raise ValueError(f"{where} line {number}: {printable(name)} has another class above")
    if not classes:
        raise ValueError(f"{where}: is empty; write file,class, a line an image")
    return classes


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
