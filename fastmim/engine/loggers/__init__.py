"""Where the numbers and pictures of a run go beside ``metrics.jsonl``: TensorBoard, CSV, Weights & Biases, MLflow.

Each through its own package, imported where it is asked for. None is worth a run: what one of them raises is one
warning, and the run goes on without it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from fastmim.engine.loggers.base import IDS_FILE, Logger, RunFacts, grouped
from fastmim.engine.loggers.files import Csv, TensorBoard
from fastmim.engine.loggers.services import MLflow, WandB
from fastmim.errors import one_line
from fastmim.files import naming
from fastmim.wording import install_extra

__all__ = ["IDS_FILE", "LOGGERS", "Loggers", "RunFacts", "check_loggers"]

log = logging.getLogger("fastmim")

LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "csv": Csv, "wandb": WandB, "mlflow": MLflow}
"""By the names that ``output.loggers`` takes."""


def check_loggers(names: Sequence[str]) -> None:
    """Import what the loggers need, before anything costs time. (TensorBoard is the default, and may be missing.)

    Raises:
        ValueError: a package is not installed, or cannot be imported.
    """
    for name in names:
        LOGGERS[name].prepare()
        for package in LOGGERS[name].packages:
            if reason := _why_not(package):
                raise ValueError(
                    f"output.loggers: {name}: {package} {reason}; {install_extra('loggers')}, or leave {name} out"
                )


def _why_not(package: str) -> str | None:
    try:
        # A mere folder of that name, as wandb makes one, can be imported too, and has no file.
        return None if import_module(package).__file__ else "is not installed"
    except ModuleNotFoundError as error:
        return "is not installed" if error.name == package else f"cannot be imported (no module {error.name})"
    except Exception as error:
        return f"cannot be imported ({one_line(error)})"


class Loggers:
    """The loggers of a run as one; each of them until it fails.

    Args:
        names: of :data:`LOGGERS`.
        facts: of the run.
    """

    def __init__(self, names: Sequence[str], facts: RunFacts) -> None:
        self._folder = facts.folder
        self._open: dict[str, Logger] = {}
        for name in names:
            with self._until_it_fails(name):
                LOGGERS[name].prepare()
                self._open[name] = LOGGERS[name](facts)

    def scalars(self, row: Mapping[str, Any]) -> None:
        """A row of ``metrics.jsonl``."""
        for name, logger in list(self._open.items()):
            with self._until_it_fails(name):
                logger.scalars(row["step"], grouped(row))

    def picture(self, title: str, path: Path, step: int) -> None:
        """A PNG of the run."""
        for name, logger in list(self._open.items()):
            with self._until_it_fails(name):
                logger.picture(title, path, step)

    def close(self) -> None:
        """Write what is left, and end what a logger has started."""
        for name in list(self._open):
            with self._until_it_fails(name):
                self._open.pop(name).close()

    @contextmanager
    def _until_it_fails(self, name: str) -> Iterator[None]:
        try:
            with naming(self._folder / LOGGERS[name].place):
                yield
        except Exception as error:
            text = str(error) if isinstance(error, ImportError) else one_line(error)
            log.warning("output.loggers: %s: %s; the run goes on without it", name, text)
            if name in self._open:
                with suppress(Exception):  # it may have processes or files that still end well
                    self._open.pop(name).close()
