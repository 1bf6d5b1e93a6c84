"""What a logger is, what it is told, and the names under which all of them show the numbers of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from fastmim.files import write_text

GROUPED = {
    "loss": "loss/train",
    "val_loss": "loss/val",
    "knn_top1": "probe/knn_top1",
    "rankme": "probe/rankme",
    "lr": "schedule/lr",
    "epoch": "schedule/epoch",
    "grad_norm": "gradient/norm",
    "images_per_sec": "speed/images_per_second",
    "step_time": "speed/step_time",
    "data_time": "speed/data_time",
    "peak_memory_gib": "memory/peak_gib",
}
"""Key of a row of ``metrics.jsonl`` → its name in every logger; what an objective adds is under ``objective/``."""
IDS_FILE = "loggers.json"


def grouped(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row but its step, under their names."""
    numbers = {key: value for key, value in row.items() if key != "step" and isinstance(value, (int, float))}
    return {GROUPED.get(key, f"objective/{key}"): float(value) for key, value in numbers.items()}


@dataclass(frozen=True)
class RunFacts:
    """What a logger is told when it opens.

    Attributes:
        folder: the run's output folder; what a logger writes lies in it.
        start: steps already done.
        settings: every key of the config as ``section.key``, with its JSON value.
        rows: rows of ``metrics.jsonl`` up to ``start``.
    """

    folder: Path
    start: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()

    def run_id(self, logger: str) -> str | None:
        """The id under which ``logger`` knows this run, if it goes on."""
        return self._ids().get(logger) if self.start else None

    def keep_id(self, logger: str, value: str) -> None:
        """Note an id for the next process."""
        write_text(self.folder / IDS_FILE, json.dumps(self._ids() | {logger: value}) + "\n")

    def _ids(self) -> dict[str, str]:
        try:
            return dict(json.loads((self.folder / IDS_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}


class Logger:
    """One place to write to. Its methods may raise: it is then left out.

    Attributes:
        place: what it writes in the run's folder.
        packages: what must be importable for it.
    """

    place: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()

    def __init__(self, facts: RunFacts) -> None:
        raise NotImplementedError

    @staticmethod
    def prepare() -> None:
        """Before the packages are imported."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of a logged step, by their grouped names."""
        raise NotImplementedError

    def picture(self, title: str, path: Path, step: int) -> None:
        """A PNG; what cannot show one passes it over."""

    def close(self) -> None:
        """Write what is left."""
        raise NotImplementedError
