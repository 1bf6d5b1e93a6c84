"""What a fine-tuning's validations say, and the files that are left of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastmim.engine import distributed
from fastmim.engine.checkpoint import consolidate
from fastmim.engine.metrics import read_rows
from fastmim.evaluate.classification import Counts, save_confusion
from fastmim.evaluate.validation import ClassCounts, validation_counts
from fastmim.files import write_text

_VERSIONS = {"": "", "ema_": "_ema"}
"""Of the classifiers of an objective: what their scores begin with, and what their files' names end with."""


class Accuracy:
    """The best weights so far, and the last table of classes; every rank has one.

    Args:
        objective: with ``classifiers``, see :class:`fastmim.objectives.classify.Classify`.
        folder: ``output.dir``.
        classes: names.
        start: steps that earlier processes have done; what their rows say counts.
        said: keyword arguments of :func:`~fastmim.engine.checkpoint.consolidate`, noted in the files.
        main: this rank writes.
    """

    def __init__(
        self,
        objective: Any,
        folder: Path,
        classes: Sequence[str],
        *,
        start: int,
        said: Mapping[str, Any],
        main: bool,
    ) -> None:
        self.objective, self.folder, self.classes, self.said, self.main = objective, folder, classes, said, main
        self._counts: dict[str, ClassCounts] = {}
        self._earlier = [row for row in read_rows(folder / "metrics.jsonl") if row["step"] <= start]
        self._best: dict[str, float] = {}

    def validate(self, batches: Any, **how: Any) -> dict[str, float]:
        """Scores of every classifier; arguments are those of :func:`validation_counts`."""
        self._counts = validation_counts(self.objective, batches, **how)
        return {
            version + name: value for version, one in self._counts.items() for name, value in one.scores().items()
        }

    def keep_best(self, saved: Path | None, save: Callable[[], Path]) -> None:
        """``best.safetensors`` and ``best_ema.safetensors``: the weights of the best validation; every rank calls it.

        Args:
            saved: this step's checkpoint, if there is one already.
            save: makes it.
        """
        for version, counts in self._counts.items():
            name, score = version + counts.headline, counts.scores()[counts.headline]
            if name not in self._best:
                self._best[name] = max((row.get(name, -1.0) for row in self._earlier), default=-1.0)
            if distributed.broadcast(score > self._best[name]):
                self._best[name], saved = score, saved or save()
                self._write(saved, "best", version, whole=True)

    def export(self, checkpoint: Path) -> None:
        """``encoder_ema.safetensors``, and ``classes.json`` and ``confusion.png`` of the last validation; rank 0."""
        for version in [name for name in self.objective.classifiers() if name]:
            self._write(checkpoint, "encoder", version)
        if not self._counts:
            return
        reports = {version: one.report(self.classes) for version, one in self._counts.items()}
        content = reports.pop("") | {version.strip("_"): one for version, one in reports.items()}
        write_text(self.folder / "classes.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        if isinstance(plain := self._counts[""], Counts):
            save_confusion(plain, self.classes, self.folder / "confusion.png")

    def _write(self, checkpoint: Path, stem: str, version: str, whole: bool = False) -> None:
        if self.main:
            out = self.folder / f"{stem}{_VERSIONS[version]}.safetensors"
            consolidate(checkpoint, out, **self.said, whole=whole, average=bool(version))
