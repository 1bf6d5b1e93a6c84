"""One thing done with many files of an index, in processes that a decoder may crash."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, Generic, NamedTuple, TypeVar

from fastmim.data.decode import DecodeError
from fastmim.data.index import ImageIndex
from fastmim.data.notes import with_notes
from fastmim.data.pool import WorkerPool, nothing_held

T = TypeVar("T")
_CHUNK = 64


class Outcome(NamedTuple):
    """What came of it, by file."""

    values: dict[int, Any]  # but for those that are None
    bad: dict[int, str]  # why a file could not be used
    notes: dict[int, str]  # what decoders warned of in the others


def each_file(
    index: ImageIndex, files: Sequence[int], use: Callable[[int], Any], num_workers: int | None = None
) -> Outcome:
    """``use(file)`` for each of `files`, in `num_workers` processes: one that a decoder crashes is replaced.

    Raises:
        DataWorkerError: the processes cannot go on.
    """
    outcome = Outcome({}, {}, {})
    for values, bad, notes in some_at_a_time(index, files, use, num_workers):
        outcome.values.update(values)
        outcome.bad.update(bad)
        outcome.notes.update(notes)
    return outcome


def some_at_a_time(
    index: ImageIndex, files: Sequence[int], use: Callable[[int], Any], num_workers: int | None = None
) -> Iterator[Outcome]:
    """What :func:`each_file` finds, of some of `files` after the other; nothing is kept of those before."""
    if not files:
        return
    workers = min(num_workers or min(8, os.cpu_count() or 1), len(files))
    chunk = max(1, min(_CHUNK, len(files) // (4 * workers)))
    parts = (files[start : start + chunk] for start in range(0, len(files), chunk))
    crashed: dict[int, str] = {}
    pool = WorkerPool(_Use(use), workers, ahead=2, label=index.label, crashed=crashed.__setitem__)
    with closing(pool):
        for outcome in pool.items(parts):
            outcome.bad.update(crashed)
            crashed.clear()
            yield outcome


class _Use(Generic[T]):
    """The data set of the pool: some files, what comes of them, and the reasons."""

    def __init__(self, use: Callable[[int], T | None]) -> None:
        self.use = use
        self.known_bad: frozenset[int] = frozenset()
        self.holding: Callable[[int], None] = nothing_held

    def __getitem__(self, files: Sequence[int]) -> Outcome:
        outcome = Outcome({}, {}, {})
        for file in files:
            if file in self.known_bad:
                continue
            self.holding(file)
            try:
                value, said = with_notes(self.use, file)
            except DecodeError as err:
                outcome.bad[file] = str(err)
                continue
            if value is not None:
                outcome.values[file] = value
            if said:
                outcome.notes[file] = "; ".join(said)
        return outcome
