"""Standard output and standard error of the commands: rank 0 talks, and nobody who has left is waited for."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from fastmim.engine.launcher import rank_or_none
from fastmim.engine.progress import warn_without_stdout
from fastmim.files import naming


def own_rank() -> int:
    """Of this process; 0 where it is alone."""
    return rank_or_none() or 0


def write(text: str) -> None:
    """To standard output, on rank 0.

    Raises:
        OSError: naming standard output, which cannot be written.
    """
    if own_rank() != 0:
        return
    if sys.stdout is None:
        raise OSError(errno.EBADF, "is closed", "standard output")
    with naming("standard output"):
        sys.stdout.write(text)
        sys.stdout.flush()


def write_if_possible(text: str) -> None:
    """To standard output, or a warning: that nobody reads what a run says is no reason not to begin it."""
    try:
        write(text)
    except OSError as error:
        warn_without_stdout(error)
        let_go_of_stdout()  # what waits there would be written, and fail, where a process is started


def say(text: str) -> None:
    """One line on standard error; the ranks other than 0 stay silent where all of them say the same."""
    if own_rank() == 0:
        to_stderr(text)


def to_stderr(text: str, at: str = "") -> None:
    """One line on standard error, whatever the rank; ``at`` stands before it."""
    with suppress(OSError):  # nobody is left to hear it
        print(f"{at}fastmim: {text}", file=sys.stderr, flush=True)


@contextmanager
def shown_on_a_terminal(text: str) -> Iterator[None]:
    """A line that stands while something takes seconds, and leaves no trace."""
    shown = own_rank() == 0 and sys.stderr is not None and sys.stderr.isatty()
    if shown:
        print(f"fastmim: {text}", end="\r", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\x1b[K", end="", file=sys.stderr, flush=True)


def let_go_of_stdout() -> None:
    """What could not be written must not be tried again at exit: that would be a second error, and another status."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on standard error where that is a terminal, a row a stage."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    progress = Progress(*columns, console=console, disable=own_rank() != 0 or not console.is_terminal)
    rows: dict[str, TaskID] = {}

    def tell(stage: str, done: int, total: int) -> None:
        if not rows:
            progress.start()
        if stage not in rows:
            rows[stage] = progress.add_task(stage, total=total)
        progress.update(rows[stage], completed=done)

    try:
        yield tell
    finally:
        if rows:  # one that was never shown would end its line all the same
            progress.stop()


class _Stderr(logging.Handler):
    """Looks standard error up at every record: the live progress line puts its own stream there."""

    def emit(self, record: logging.LogRecord) -> None:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        at = time.strftime("%H:%M:%S", time.localtime(record.created))
        to_stderr(_folded(f"{level}{self.format(record)}"), at=f"{at} ")


class _SaidOnce(logging.Filter):
    """Each warning once a command: what several parts of a run find out by themselves is one fact to its reader.

    A record's ``fact`` tells two wordings of one fact; with ``repeats`` the same words are news each time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._said: set[Hashable] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING or getattr(record, "repeats", False):
            return True
        fact = getattr(record, "fact", record.getMessage())
        is_new = fact not in self._said
        self._said.add(fact)
        return is_new


def _folded(text: str) -> str:
    """A line of the log as a terminal shows it whole, broken between words; elsewhere it stays one line."""
    if "\n" in text or sys.stderr is None or not sys.stderr.isatty():
        return text
    width = max(shutil.get_terminal_size().columns - 18, 40)  # behind the time and the program's name
    return textwrap.fill(text, width, subsequent_indent=" " * 9, break_long_words=False, break_on_hyphens=False)


def _once(show: Callable[..., None]) -> Callable[..., None]:
    """Shows each warning of a library once: reading images in this process makes Python forget what it has shown."""
    shown: set[tuple[Any, ...]] = set()

    def show_once(message: Any, category: Any, filename: str, lineno: int, *where: Any, **more: Any) -> None:
        if (key := (str(message), category, filename, lineno)) not in shown:
            shown.add(key)
            show(message, category, filename, lineno, *where, **more)

    return show_once


def log_to_stderr() -> None:
    """Let the package's log be written to standard error: all of it on rank 0, errors on the others."""
    log = logging.getLogger("fastmim")
    if not log.handlers:
        log.addHandler(_Stderr())
        if not sys.warnoptions:
            warnings.showwarning = _once(warnings.showwarning)
    for handler in log.handlers:
        if isinstance(handler, _Stderr):
            handler.filters = [_SaidOnce()]
    log.setLevel(logging.INFO if own_rank() == 0 else logging.ERROR)
    if own_rank() and not sys.warnoptions:
        warnings.simplefilter("ignore")  # rank 0 meets the same ones
