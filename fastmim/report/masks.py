"""What a run's objective hides, drawn anew from its settings as SVG that takes the colours of the page."""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any, NamedTuple

from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastmim.engine.dry_step import built
from fastmim.engine.saved import objective_of
from fastmim.evaluate.mask_report import SHOWN, mask_report
from fastmim.report.runs import RunFiles

_MOST_PIXELS = 1 << 19
"""Of an image: the masks of a larger one are left to `fastmim masks`, which takes a while."""


class Masks(NamedTuple):
    """Of a run: an ``<svg …>`` a mask; and what they are and how far they hide, or why there are none."""

    svgs: list[str]
    said: str


def masks_of(run: RunFiles) -> Masks | None:
    """The first masks that training draws in the epoch of the run's last row; None where nothing is hidden."""
    settings = {key: value for key, value in run.settings.items() if key != "model.init_from"}
    try:
        with FakeTensorMode():  # the weights of a giant are not needed
            objective: Any = built(lambda: objective_of(settings, run.folder))
    except Exception as error:  # settings of another version may fail anywhere; the rest of the page is worth having
        return Masks([], f"Not drawn: {' '.join(str(error).split())[:300]}")
    if math.prod(objective.img_size) > _MOST_PIXELS:
        return Masks([], "Not drawn of images as large as these: see `fastmim masks`.")
    try:
        epoch = int(run.last("epoch") or 0)
        found = mask_report(objective, seed=int(settings.get("train.seed") or 0), epoch=epoch)
    except (ValueError, TypeError, OverflowError):
        return None
    what = f"The first {SHOWN} {found.what()} of epoch {epoch}, filled where hidden: {found.share()}"
    distance = f"AvgDist, from a hidden pixel to the nearest visible one, {found.distance:.1f} px"
    return Masks([_svg(one, found.unit) for one in found.hidden[:SHOWN]], f"{what}; {distance}.")


def _svg(hidden: Tensor, unit: int) -> str:
    """A mask (H, W) of cells of ``unit`` pixels; neighbours in a row are one rectangle."""
    height, width = hidden.shape
    path = ""
    for row, cells in enumerate(hidden[::unit, ::unit].tolist()):
        column = 0
        for is_hidden, run in groupby(cells):
            length = len(list(run))
            if is_hidden:
                path += f"M{column * unit} {row * unit}h{length * unit}v{unit}h-{length * unit}z"
            column += length
    drawn = f'<path d="{path}" fill="currentColor"/>'
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="a mask">{drawn}</svg>'
