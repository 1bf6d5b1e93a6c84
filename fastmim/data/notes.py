"""What decoders say beside their pixels, so that it can be told with the name of the file.

libjpeg and libtiff write to standard error, PIL warns; neither knows which file it has before it.
"""

from __future__ import annotations

import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from fastmim.data.decode import DecodeError
from fastmim.data.memory_file import memory_file

_STDERR = 2
#: The words of the libraries, where others may write too: anything else on standard error is passed on.
_LIBRARIES = re.compile(r"JPEG|libpng|SOS param|progression seq|^_?\w*(TIFF|Decode|Setup|Lib)\w*: ")
_NOT_OF_THE_FILE = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
T = TypeVar("T")
_lock = threading.Lock()
_only_decoders = False
_FILES: dict[int, int] = {}  # by process: a forked one must not share the place of writing


def only_decoders_here() -> None:
    """From now on only decoders write to this process's standard error: every line is theirs. For a forked worker."""
    global _only_decoders, _lock
    _only_decoders, _lock = True, threading.Lock()  # another thread of the trainer may have held the lock


def with_notes(use: Callable[[int], T], file: int) -> tuple[T, list[str]]:
    """(use(file), what decoders warned of in it); a DecodeError has the first warning behind its own reason."""
    said: list[str] = []
    try:
        with noted() as said:
            return use(file), said
    except DecodeError as err:
        raise DecodeError(f"{err} ({said[0]})" if said and said[0] not in str(err) else str(err)) from None


@contextmanager
def noted() -> Iterator[list[str]]:
    """The list that it gives holds, after the block, the warnings of the decoders that ran in it, a line each.

    One block at a time; another thread waits.
    """
    lines: list[str] = []
    with _lock, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with _written_by_libraries(lines):
                yield lines
        finally:
            lines += [_line(str(w.message)) for w in caught if not issubclass(w.category, _NOT_OF_THE_FILE)]


@contextmanager
def _written_by_libraries(lines: list[str]) -> Iterator[None]:
    try:
        stderr = os.dup(_STDERR)
    except OSError:  # closed: nothing can be said there
        yield
        return
    if os.getpid() not in _FILES:
        _FILES.clear()
        _FILES[os.getpid()] = memory_file()
    file = _FILES[os.getpid()]
    os.dup2(file, _STDERR)
    try:
        yield
    finally:
        os.dup2(stderr, _STDERR)
        os.close(stderr)
        size = os.lseek(file, 0, os.SEEK_CUR)
        if size:
            text = os.pread(file, size, 0).decode("utf-8", "backslashreplace")
            os.lseek(file, 0, os.SEEK_SET)
            for line in text.splitlines(keepends=True):
                if _only_decoders or _LIBRARIES.search(line):
                    lines.append(_line(line))
                else:
                    os.write(_STDERR, line.encode())


def _line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")
