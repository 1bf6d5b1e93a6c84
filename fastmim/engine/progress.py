"""What a person sees while the run goes on: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

log = logging.getLogger("fastmim")


def format_duration(seconds: float) -> str:
    """``1:02:03`` for 3723 seconds."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"


def format_row(row: Mapping[str, Any], total_steps: int) -> str:
    """One line for one logged step."""
    parts = [f"step {row['step']}/{total_steps}", f"epoch {row['epoch']:.2f}", f"loss {row['loss']:.4f}"]
    if "val_loss" in row:
        parts.append(f"val {row['val_loss']:.4f}")
    parts += [f"lr {row['lr']:.2e}", f"grad {row['grad_norm']:.3f}", f"{row['images_per_sec']:.1f} img/s"]
    return "  ".join(parts)


@contextmanager
def counted(what: str, *, enabled: bool, stderr: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A live line "``what`` done/of" on a terminal, for the function that it gives; elsewhere one line at the start."""
    from rich.console import Console
    from rich.status import Status

    console = Console(highlight=False, markup=False, soft_wrap=True, quiet=not enabled, stderr=stderr)
    if not console.is_terminal:
        console.print(f"{what} …")
        yield lambda done, of: None
        return
    with Status(f"{what} …", console=console) as status:
        yield lambda done, of: status.update(f"{what} {done}/{of}")


class Progress:
    """Progress of the run on standard output; on ranks other than 0 it says nothing.

    Args:
        total_steps: length of the run.
        start: steps already done.
        enabled: False on ranks that keep silent.
    """

    def __init__(self, *, total_steps: int, start: int, enabled: bool) -> None:
        self._total, self._start, self._enabled = total_steps, start, enabled
        self._began = time.monotonic()
        self._live: Any = None
        self._task: Any = None
        if enabled:
            self._open()

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Live

        self._console = Console(highlight=False, markup=False, soft_wrap=True)
        if self._console.is_terminal:
            columns = (BarColumn(bar_width=24), TextColumn("{task.description}"), TimeRemainingColumn())
            self._live = Live(*columns, console=self._console)
            self._task = self._live.add_task("first step …", total=self._total, completed=self._start)
            self._live.start()

    def advance(self, step: int) -> None:
        """A step was queued (no number is read from the device for it)."""
        if self._live is not None:
            self._live.update(self._task, completed=step)

    def row(self, row: Mapping[str, Any]) -> None:
        """Show a logged step: in the live line, or as a line of its own with the time that is left."""
        if not self._enabled:
            return
        text = format_row(row, self._total)
        if self._live is not None:
            self._live.update(self._task, description=text)
            return
        per_step = (time.monotonic() - self._began) / max(row["step"] - self._start, 1)
        self.say(f"{text}  eta {format_duration(per_step * (self._total - row['step']))}")

    def say(self, text: str) -> None:
        """Print one line above the live one."""
        with self._writing():
            if self._enabled:
                self._console.print(text)
                self._console.file.flush()

    def close(self) -> None:
        """Leave the terminal in order."""
        live, self._live = self._live, None
        with self._writing():
            if live is not None:
                live.stop()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A closed terminal, a pipe whose reader has left, a full disk: no reason to lose a run."""
        try:
            yield
        except (OSError, SystemExit) as error:  # rich asks for the end of the program where a pipe is broken
            self._enabled, self._live = False, None
            reason = getattr(error, "strerror", None) or "broken pipe"
            log.warning("standard output cannot be written (%s): the run goes on without it", reason.lower())
