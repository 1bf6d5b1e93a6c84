"""The loss curve of a run, and the accuracy of its features, drawn from its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastmim.evaluate.figure import empty_figure
from fastmim.files import replacing


def save_curve(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path | None:
    """Draw training and validation loss over steps as a PNG, and k-NN accuracy on an axis of its own.

    Args:
        rows: rows of ``metrics.jsonl``: ``step``, ``loss`` and, on some, ``val_loss`` and ``knn_top1``.
        path: the PNG to write.

    Returns:
        The path, or None where matplotlib is not installed (a warning says so) or there is nothing to draw.
    """
    figure = empty_figure((6, 4), "loss curve")
    if figure is None or not rows:
        return None
    axes = figure.add_subplot()
    lines = axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], label="training")
    lines += _dotted(axes, rows, "val_loss", "C1", "validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    if any("knn_top1" in row for row in rows):
        right = axes.twinx()
        right.set_ylabel("k-NN top-1, %")
        lines += _dotted(right, rows, "knn_top1", "C2", "k-NN")
    axes.legend(handles=lines)
    path = Path(path)
    with replacing(path) as partial:
        figure.savefig(partial, format="png")
    return path


def _dotted(axes: Any, rows: Sequence[Mapping[str, Any]], key: str, colour: str, label: str) -> list[Any]:
    """The line of a number that only some rows have; none where no row has it."""
    found = [(row["step"], row[key]) for row in rows if key in row]
    return axes.plot(*zip(*found, strict=True), "o-", markersize=3, color=colour, label=label) if found else []
