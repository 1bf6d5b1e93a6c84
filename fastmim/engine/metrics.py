"""Numbers of a run: ``metrics.jsonl``, the loggers, and the clock behind images per second."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from fastmim.engine.loggers import Loggers, RunFacts
from fastmim.files import naming, write_text

log = logging.getLogger("fastmim")


def peak_memory() -> tuple[float, str]:
    """Peak memory of this process in GiB and its kind: ``"cuda"`` (allocated) or ``"rss"`` (resident)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30, "cuda"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, "rss"


class StepClock:
    """Wall clock of training alone: time inside :meth:`paused` (validation, saving) does not count."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around fetching a micro-batch."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def phase(self, name: str) -> AbstractContextManager[None]:
        """A phase of :func:`fastmim.engine.loop.train_step`: the host waits in "data" only."""
        return self.waiting() if name == "data" else nullcontext()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around work that is not training."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def read(self, steps: int, images: int, keep: bool = False) -> dict[str, float]:
        """Since the last call: ``images_per_sec``, ``step_time`` and ``data_time`` (seconds per step).

        With ``keep`` the next call counts from where this one did.
        """
        now = time.perf_counter()
        elapsed = max(now - self._began, 1e-9)
        steps = max(steps, 1)
        values = {
            "images_per_sec": images / elapsed,
            "step_time": elapsed / steps,
            "data_time": self._waited / steps,
        }
        if not keep:
            self._began, self._waited = now, 0.0
        return values


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a ``metrics.jsonl``; a last line cut off by a kill is dropped."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            log.warning("%s: dropping an incomplete line", path)
    return rows


class Metrics:
    """Writes logged steps to ``metrics.jsonl`` and to the loggers; does nothing on ranks other than 0.

    Args:
        folder: the run's output folder.
        start: steps already done; later rows of an earlier process are removed, so that no step appears
            twice.
        loggers: of :data:`fastmim.engine.loggers.LOGGERS`.
        settings: every key of the config, for the loggers.
        enabled: False on ranks that write nothing.
    """

    def __init__(
        self, folder: Path, *, start: int, loggers: Sequence[str], settings: Mapping[str, Any], enabled: bool
    ) -> None:
        self._file: Any = None
        if not enabled:
            return
        path = folder / "metrics.jsonl"
        rows = [row for row in read_rows(path) if row["step"] <= start]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = path.open("a", encoding="utf-8")
        self._loggers = Loggers(loggers, RunFacts(folder, start, settings, rows))

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; numbers other than ``step`` become scalars of the loggers."""
        if self._file is None:
            return
        with naming(self._file.name):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        self._loggers.scalars(row)

    def picture(self, title: str, path: Path, step: int) -> None:
        """Show a picture file in the loggers."""
        if self._file is not None:
            self._loggers.picture(title, path, step)

    def close(self) -> None:
        """Flush and close the files."""
        if self._file is None:
            return
        self._loggers.close()
        with naming(self._file.name):
            self._file.close()
