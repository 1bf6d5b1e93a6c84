"""The loss curve of a run, drawn from its metrics."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastmim.files import replacing
from fastmim.wording import install_packages

log = logging.getLogger("fastmim")


def save_curve(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path | None:
    """Draw training and validation loss over steps as a PNG.

    Args:
        rows: rows of ``metrics.jsonl``: ``step``, ``loss`` and, on some, ``val_loss``.
        path: the PNG to write.

    Returns:
        The path, or None where matplotlib is not installed (a warning says so) or there is nothing to draw.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("matplotlib is not installed: no loss curve; %s", install_packages("matplotlib"))
        return None
    if not rows:
        return None
    # Figure and canvas directly: pyplot would pick a window system and keep the figure alive.
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], label="training")
    validated = [row for row in rows if "val_loss" in row]
    if validated:
        steps, losses = [row["step"] for row in validated], [row["val_loss"] for row in validated]
        axes.plot(steps, losses, "o-", markersize=3, label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("reconstruction loss")
    axes.grid(alpha=0.3)
    axes.legend()
    path = Path(path)
    with replacing(path) as partial:
        figure.savefig(partial, format="png")
    return path
