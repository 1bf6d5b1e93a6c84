"""Loggers that write files of their own: TensorBoard's events, and a table."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastmim.engine.loggers.base import Logger, RunFacts, grouped
from fastmim.files import replacing
from fastmim.wording import install_packages


class TensorBoard(Logger):
    """Event files in ``tensorboard/``, with the settings as hyperparameters."""

    place = "tensorboard"

    def __init__(self, facts: RunFacts) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
            from torch.utils.tensorboard.summary import hparams
        except ImportError:
            raise ImportError(
                f"TensorBoard is not installed: no event files; {install_packages('tensorboard')}"
            ) from None
        # Also from the start: without it, events of an earlier run in the same folder stay in the curves.
        open_writer: Any = SummaryWriter
        self._writer = open_writer(str(facts.folder / self.place), purge_step=facts.start + 1)
        plain = (bool, int, float, str)
        settings = {k: v if isinstance(v, plain) else json.dumps(v) for k, v in facts.settings.items()}
        # SummaryWriter.add_hparams() would open a second run for them, with metrics of its own.
        for summary in hparams(settings, dict.fromkeys(("loss/train", "loss/val"))) if settings else ():
            self._writer.file_writer.add_summary(summary)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, title: str, path: Path, step: int) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self._writer.add_image(title, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Csv(Logger):
    """``metrics.csv``: a column stays where it is, in this process and the next; a new one is added at the end."""

    place = "metrics.csv"

    def __init__(self, facts: RunFacts) -> None:
        self._path = facts.folder / self.place
        self._columns = (self._read()[0] if facts.start else []) or ["step"]
        self._file: Any = None
        self._rewrite([{"step": row["step"], **grouped(row)} for row in facts.rows])

    def _read(self) -> tuple[list[str], list[dict[str, Any]]]:
        """Columns and rows as they are on the disk."""
        if not self._path.is_file():
            return [], []
        with self._path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            return list(reader.fieldnames or []), list(reader)

    def _rewrite(self, rows: Iterable[Mapping[str, Any]]) -> None:
        rows = list(rows)
        self._columns = list(dict.fromkeys([*self._columns, *(name for row in rows for name in row)]))
        self.close()
        with replacing(self._path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        self._file = self._path.open("a", encoding="utf-8", newline="")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        row = {"step": step, **values}
        if not row.keys() <= set(self._columns):
            self._rewrite([*self._read()[1], row])
            return
        csv.DictWriter(self._file, self._columns).writerow(row)
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
