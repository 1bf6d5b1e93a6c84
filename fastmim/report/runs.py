"""What a run has left in its output folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from fastmim.data.names import printable
from fastmim.engine.checkpoint import list_checkpoints, step_of
from fastmim.engine.checkpoint.save import read_state
from fastmim.engine.metrics import read_rows
from fastmim.engine.settings import flat

Row = dict[str, Any]
MODEL, OBJECTIVE = "model.name", "objective.name"
_PER_CENT = ("top1", "val_top1", "val_top5", "val_ece", "ema_val_top1", "ema_val_top5", "ema_val_ece")
"""Shares in ``metrics.jsonl``, which the page shows per hundred as it does ``knn_top1``."""


@dataclass
class RunFiles:
    """The folder of a run.

    Attributes:
        name: short, and unlike that of any other run of the page.
        folder: the run's ``output.dir``.
        rows: of ``metrics.jsonl``, by step.
        settings: every key of ``config.yaml`` as ``section.key``.
    """

    name: str
    folder: Path
    rows: list[Row]
    settings: dict[str, Any]

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of the rows that have this number."""
        return [(row["step"], float(row[key])) for row in self.rows if isinstance(row.get(key), (int, float))]

    def last(self, key: str) -> float | None:
        """The last value of a number."""
        found = self.series(key)
        return found[-1][1] if found else None

    @property
    def step(self) -> int:
        """Updates done, as far as the rows tell."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @cached_property
    def total(self) -> int | None:
        """Updates that the run was to make, of its last checkpoint; None without one."""
        found = list_checkpoints(self.folder / "checkpoints")
        try:
            return int(read_state(found[-1])["total"]) if found else None
        except (ValueError, KeyError, TypeError):
            return None

    @cached_property
    def pictures(self) -> list[tuple[int, Path]]:
        """(step, file) of the pictures, by step."""
        found = [(step_of(path.with_suffix("")), path) for path in (self.folder / "reconstructions").glob("*.png")]
        return sorted((step, path) for step, path in found if step is not None)

    @cached_property
    def bad_files(self) -> dict[str, str]:
        """Path → reason of the files that could not be used."""
        return {str(path): str(why) for path, why in self._json("bad_files.json").items()}

    @cached_property
    def classes(self) -> list[Row]:
        """Of a fine-tuning: a row a class."""
        rows = self._json("classes.json").get("classes", [])
        return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []

    def _json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def seconds(self) -> float:
        """Time inside training steps, as far as the rows tell: validation, pictures and saving are not in it."""
        steps = [0] + [row["step"] for row in self.rows]
        lengths = [row.get("step_time", 0.0) for row in self.rows]
        return sum((b - a) * each for a, b, each in zip(steps, steps[1:], lengths, strict=False))

    def speed(self) -> float | None:
        """Median of images a second over the rows, the first left out where there are others."""
        found = [value for _, value in self.series("images_per_sec")]
        return median(found[1:] or found) if found else None


def read_run(folder: str | os.PathLike[str], name: str) -> RunFiles:
    """What is in a run's output folder.

    Raises:
        ValueError: it is none, or its config or its rows cannot be read.
    """
    path = Path(folder)
    if not (path / "config.yaml").is_file():
        what = "no such folder" if not path.is_dir() else "no config.yaml there"
        raise ValueError(f"{printable(str(path))}: {what}; give the output folder of a run")
    try:
        # Read as what it says, not as a config to train by: one of another version is shown too.
        tree = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        settings = dict.fromkeys((MODEL, OBJECTIVE), "?") | flat(tree)
    except (ValueError, AttributeError, OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path / 'config.yaml'}: not a config ({' '.join(str(error).split())[:200]})") from None
    try:
        rows = [_scaled(row) for row in read_rows(path / "metrics.jsonl")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / 'metrics.jsonl'}: not rows of numbers ({' '.join(str(error).split())})") from None
    return RunFiles(name, path, rows, settings)


def _scaled(row: Row) -> Row:
    return {key: 100 * value if key in _PER_CENT else value for key, value in row.items()}


def read_runs(folders: Sequence[str | os.PathLike[str]]) -> list[RunFiles]:
    """Of several folders, each under the last parts of its path that no other shares."""
    real = [Path(os.path.realpath(folder)) for folder in folders]
    twice = [str(folder) for i, folder in enumerate(folders) if real[i] in real[:i]]
    if twice:
        raise ValueError(f"{twice[0]}: given twice")
    return [read_run(folder, name) for folder, name in zip(folders, _short(real), strict=True)]


def _short(paths: Sequence[Path]) -> list[str]:
    """The fewest last parts of the paths by which all of them differ."""
    longest = max(len(path.parts) for path in paths)
    for parts in range(1, longest + 1):
        names = ["/".join(path.parts[-parts:]).lstrip("/") for path in paths]
        if len(set(names)) == len(names):
            return [printable(name) for name in names]
    return [printable(str(path)) for path in paths]


def differing(runs: Iterable[RunFiles]) -> dict[str, list[Any]]:
    """Keys in which the configs differ → their values, a run each; None where a config does not have it."""
    every = [run.settings for run in runs]
    keys = dict.fromkeys(key for settings in every for key in settings)
    found = {key: [settings.get(key) for settings in every] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}
