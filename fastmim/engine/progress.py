"""What a person sees while the run goes on: lines with the time of day, and on a terminal a live one below them."""

from __future__ import annotations

import logging
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fastmim.wording import plural

log = logging.getLogger("fastmim")

_WORTH_SAYING = 10.0  # seconds that are left where the end is announced


def format_duration(seconds: float) -> str:
    """``1:02:03`` for 3723 seconds."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"


def clock() -> str:
    """The time of day, as lines of a log begin with it."""
    return time.strftime("%H:%M:%S")


def format_row(row: Mapping[str, Any], total_steps: int, *, eta: str = "", width: int = 80) -> str:
    """One line for one logged step; what does not fit into ``width`` is left to ``metrics.jsonl``.

    Left out in this order: the epoch, the gradient norm, the learning rate.
    """
    step, rate = f"step {row['step']}/{total_steps}", row["images_per_sec"]
    parts = {
        "step": step.ljust(len(f"step {total_steps}/{total_steps}")),
        "epoch": f"epoch {row['epoch']:.2f}",
        "loss": f"loss {row['loss']:.4f}",
        "val": f"val {row['val_loss']:.4f}" if "val_loss" in row else "",
        "knn": f"k-NN {row['knn_top1']:.1f} %" if "knn_top1" in row else "",
        "lr": f"lr {row['lr']:.2e}",
        "grad": f"grad {row['grad_norm']:.3g}",
        "speed": f"{rate:.0f} img/s" if rate >= 10 else f"{rate:.2g} img/s",
        "eta": f"eta {eta}" if eta else "",
    }
    room = width - len("  eta 0:00:00") * (not eta)  # it is not known at first, and the columns stay
    for name in ("epoch", "grad", "lr", ""):
        text = "  ".join(part for part in parts.values() if part)
        if len(text) <= room or not name:
            break
        parts[name] = ""
    return text


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


@contextmanager
def said_if_slow(text: str, *, enabled: bool, seconds: float = 4.0) -> Iterator[None]:
    """A line of the log, if what is inside takes longer than that; a wrong request is usually found before."""
    timer = threading.Timer(seconds, log.info, [text])
    timer.daemon = True
    if enabled:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def warn_without_stdout(error: BaseException) -> None:
    """Say that standard output cannot be written, for ``error``, and that the run goes on."""
    reason = getattr(error, "strerror", None) or "broken pipe"
    log.warning("standard output cannot be written (%s): the run goes on without it", reason.lower())


class Progress:
    """Progress of the run on standard output; on ranks other than 0 it says nothing.

    Args:
        total_steps: length of the run.
        start: steps already done.
        enabled: False on ranks that keep silent.
    """

    def __init__(self, *, total_steps: int, start: int, enabled: bool) -> None:
        self._total, self._start, self._enabled = total_steps, start, enabled
        # The step and the time that the speed is counted from: the first step also starts workers and compiles.
        self._since: tuple[int, float] | None = None
        self._promised = False
        self._live: Any = None
        self._task: Any = None
        if enabled:
            self._open()

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Live

        self._console = Console(highlight=False, markup=False, soft_wrap=True)
        if self._console.is_terminal:
            columns = (BarColumn(bar_width=24), TextColumn("{task.description}"))
            self._live = Live(*columns, console=self._console, transient=True)
            self._task = self._live.add_task("", total=self._total, completed=self._start)

    def begin(self) -> None:
        """The first step is about to be taken."""
        if self._live is not None:
            self._live.update(self._task, description="first step …")
            self._live.start()

    def advance(self, step: int) -> None:
        """A step was queued (no number is read from the device for it)."""
        if self._live is not None:
            left = self._left(step)
            text = f"step {step}/{self._total}" + ("" if left is None else f"  eta {format_duration(left)}")
            self._live.update(self._task, completed=step, description=text)

    def row(self, row: Mapping[str, Any]) -> None:
        """Show a logged step with the time that is left; the first ones say when the run will end."""
        if not self._enabled:
            return
        step = int(row["step"])
        left = self._left(step)
        eta = "" if left is None else format_duration(left)
        self.say(f"{clock()} {format_row(row, self._total, eta=eta, width=self._console.width - 9)}")
        if self._since is None:
            self._since = step, time.monotonic()
        elif left is not None and left >= _WORTH_SAYING and not self._promised:
            self._promised = True
            self.say(f"{clock()} about {eta} for the {plural(self._total - step, 'step')} left, until {_until(left)}")

    def _left(self, step: int) -> float | None:
        """Seconds, with all that lies between the steps; None until it is known."""
        if self._since is None or step <= self._since[0]:
            return None
        per_step = (time.monotonic() - self._since[1]) / (step - self._since[0])
        return per_step * (self._total - step)

    def say(self, text: str) -> None:
        """Print one line above the live one."""
        with self._writing():
            if self._enabled:
                self._console.print(text)
                self._console.file.flush()

    def item(self, text: str) -> None:
        """Print one of a list; a line of a terminal ends between words, a log keeps it in one line."""
        lines = [text]
        if self._enabled and self._console.is_terminal:
            lines = textwrap.wrap(text, self._console.width - 6, break_long_words=False, break_on_hyphens=False)
        self.say("  " + f"\n{'':6}".join(lines))

    def table(self, rows: Sequence[tuple[str, str]]) -> None:
        """Print names and values, a pair a line; a value too long for it is broken at its commas."""
        wide = max((len(name) for name, _ in rows), default=0)
        for name, value in rows:
            for i, line in enumerate(_wrapped(value, self._console.width - wide - 4 if self._enabled else 80)):
                self.say(f"  {'' if i else name:{wide}}  {line}")

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
            warn_without_stdout(error)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` where commas allow it: a path stays in one piece."""
    lines = [""]
    for part in text.split(", "):
        joined = f"{lines[-1]}, {part}" if lines[-1] else part
        if lines[-1] and len(joined) >= width:
            lines[-1] += ","
            lines.append(part)
        else:
            lines[-1] = joined
    return lines


def _until(seconds: float) -> str:
    """The time of day in so many seconds, with the date if it is another day."""
    end = time.localtime(time.time() + seconds)
    same_day = end[:3] == time.localtime()[:3]
    return time.strftime("%H:%M" if same_day else "%Y-%m-%d %H:%M", end)
