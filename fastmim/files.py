"""Files that are written: whole or not at all, and errors of the system that name them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Around what uses the file or folder ``path``: an ``OSError`` that names none, as those of writing, flushing and
    closing do not, names this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, which takes its place where the block ends well and is removed where not.

    Raises:
        OSError: naming ``path``.
    """
    partial = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")
    try:
        with naming(path):
            yield partial
            partial.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename == str(partial):
            error.filename = str(path)
        with suppress(OSError):
            partial.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8 as a whole; what is no valid unicode, as in the name of a file, as its escape.

    Raises:
        OSError: naming ``path``.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
