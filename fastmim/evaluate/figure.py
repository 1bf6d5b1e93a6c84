"""An empty figure of matplotlib, which may be missing."""

from __future__ import annotations

import logging
from typing import Any

from fastmim.wording import install_packages

log = logging.getLogger("fastmim")


def empty_figure(inches: tuple[float, float], what: str) -> Any:
    """A Figure to draw on and save; None where matplotlib is not installed, and a warning that ``what`` is left out.

    Figure and canvas directly: pyplot would pick a window system and keep the figure alive.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("matplotlib is not installed: no %s; %s", what, install_packages("matplotlib"))
        return None
    figure = Figure(figsize=inches, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
