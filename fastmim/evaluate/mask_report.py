"""What the masks of an objective hide, and how far hidden pixels are from visible ones: as text and as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmim.files import replacing
from fastmim.objectives.pictures import GREY, to_rgb
from fastmim.objectives.simmim import SimMIM
from fastmim.wording import plural

from .figure import empty_figure
from .mask_distance import (
    PUBLISHED_BAND,
    PUBLISHED_SIZE,
    RATIOS,
    SQUARES,
    average_distance,
    distance_band,
    distance_table,
    hidden_pixels,
    table_units,
)

LEAST_MASKS = 64
"""Masks of which ratio and distance are the means, more where more are drawn."""
SHOWN = 8
"""Of which are drawn, where no number is given."""
_COLUMNS = 8
_TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


@dataclass(frozen=True)
class MaskReport:
    """Masks of an objective and how far they hide.

    Attributes:
        hidden: (N, H, W) bool, of the sample ids from 0 on; of objectives with several crops an image, the first.
        kind: Of the table: "random", "block" or "square".
        unit: Edge in pixels of what a mask hides as a whole.
        units: Hidden units of every image and all of them; None where masks are of patches or tokens.
        ratio: Mean share of hidden pixels.
        distance: AvgDist in pixels, see :func:`.mask_distance.average_distance`.
        is_simmim: Whether the band, of SimMIM's good runs, is a guide to these masks.
    """

    hidden: Tensor
    kind: str
    unit: int
    units: tuple[int, int] | None
    ratio: float
    distance: float
    is_simmim: bool

    @cached_property
    def table(self) -> dict[tuple[int, float], float]:
        """AvgDist of other masks of this kind, by (unit, ratio)."""
        return distance_table(self.img_size, table_units(self.img_size, self.unit), self.kind)

    @property
    def img_size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.hidden.shape[1], self.hidden.shape[2]

    @property
    def band(self) -> tuple[float, float]:
        """See :func:`.mask_distance.distance_band`."""
        return distance_band(self.img_size)

    def __str__(self) -> str:
        lines = [
            self.what(),
            f"hidden    {self.share()}",
            f"AvgDist   {self.distance:.1f} px, {_place(self.distance, self.band, self.is_simmim)}",
            _origin(self.band),
            "",
            f"AvgDist of {self.kind} masks by unit and ratio, px; * = in the band",
            *_table_lines(self),
        ]
        return "\n".join(lines)

    def what(self) -> str:
        """Which masks these are."""
        of_units = "masks of cells" if self.units is None else f"{self.kind} masks of units"
        return f"{of_units} of {self.unit} px in images of {self.img_size[0]} × {self.img_size[1]} px"

    def share(self) -> str:
        """How much they hide."""
        count = "" if self.units is None else f": {self.units[0]} of {plural(self.units[1], 'unit')}"
        return f"{100 * self.ratio:.1f} % of the pixels{count}"


def mask_report(objective: Any, *, seed: int = 0, epoch: int = 0, count: int = SHOWN) -> MaskReport:
    """Draw masks of an objective as training with this seed does in this epoch.

    Args:
        objective: An :class:`~fastmim.objectives.Objective`; its weights do not matter.
        seed, epoch: Keys of the masks.
        count: Masks that are kept at least.

    Raises:
        ValueError: It hides nothing.
    """
    name, size, units = type(objective).__name__, objective.img_size, objective.unit_masks()
    if objective.takes_labels:
        raise ValueError(f"objective: {name} learns classes and hides nothing; give another objective")
    mask = objective.random_mask(torch.arange(max(count, LEAST_MASKS)), seed=seed, epoch=epoch)
    mask = mask[0] if mask.ndim == 4 else mask
    if mask.ndim != 3 or not bool(mask.any()):
        raise ValueError(f"objective: {name} hides nothing in epoch {epoch}; give another epoch, or another objective")
    encoder = objective.encoder
    cell = encoder.patch_size if tuple(mask.shape[1:]) == tuple(encoder.grid) else encoder.stride
    hidden = hidden_pixels(mask, size, cell)
    kind, unit = ("random", cell) if units is None else (units.kind, units.unit)
    return MaskReport(
        hidden,
        kind,
        unit,
        None if units is None else (units.hidden, units.hidden + units.shown),
        float(hidden.double().mean()),
        average_distance(hidden),
        isinstance(objective, SimMIM),
    )


def _place(distance: float, band: tuple[float, float], is_simmim: bool) -> str:
    if band[0] <= distance <= band[1]:
        return "in the band of SimMIM's good runs"
    where = f"{'below' if distance < band[0] else 'above'} the band of SimMIM's good runs"
    if not is_simmim:
        return f"{where}, which says little of another objective"
    return (
        f"{where}: {'larger' if distance < band[0] else 'smaller'} units or "
        f"{'more' if distance < band[0] else 'fewer'} of them hidden would be nearer"
    )


def _origin(band: tuple[float, float]) -> str:
    low, high = PUBLISHED_BAND
    text = f"band      {low:g} to {high:g} px (Swin-B, images of {PUBLISHED_SIZE} px)"
    return text if band == PUBLISHED_BAND else f"{text}; here {band[0]:.1f} to {band[1]:.1f} px in proportion, a guess"


def _table_lines(report: MaskReport) -> list[str]:
    """A row a unit; a column a ratio, or of squares an edge in units with the ratio behind the distance."""
    square, (height, width) = report.kind == "square", report.img_size
    heads = [f"{f'{edge} × {edge}':>15}" for edge in SQUARES] if square else [f"{ratio:>7.1f}" for ratio in RATIOS]
    lines = ["unit  " + "".join(heads)]
    for unit in _units(report):
        cells = -(-height // unit) * -(-width // unit)
        ratios = [edge * edge / cells for edge in SQUARES] if square else RATIOS
        row = "".join(_entry(report.table.get((unit, ratio)), ratio, report) for ratio in ratios)
        lines.append(f"{unit:>4}  {row}".rstrip())
    return lines


def _entry(distance: float | None, ratio: float, report: MaskReport) -> str:
    low, high = report.band
    if distance is None:
        return f"{'–':>6} " + (" " * 8 if report.kind == "square" else "")
    share = f" ({ratio:.3f})" if report.kind == "square" else ""
    return f"{distance:>6.1f}{'*' if low <= distance <= high else ' '}{share}"


def _units(report: MaskReport) -> list[int]:
    return sorted({unit for unit, _ in report.table})


def save_mask_picture(report: MaskReport, path: str | Path, images: Tensor | None = None, shown: int = SHOWN) -> bool:
    """Draw masks, and the table as curves with the band, as a PNG.

    Args:
        report: Of :func:`mask_report`.
        path: The file; it appears complete or not at all.
        images: (N, C, H, W) in [0, 1] to put under the first masks; under others is white.
        shown: Masks to draw.

    Returns:
        Whether it was drawn: not without matplotlib, and a warning says so.
    """
    hidden = report.hidden[:shown]
    columns = min(_COLUMNS, len(hidden))
    rows = -(-len(hidden) // columns)
    figure = empty_figure((9, 4 + 1.2 * rows), "picture of masks")
    if figure is None:
        return False
    above, below = figure.subfigures(2, 1, height_ratios=(1.2 * rows, 4))
    _draw_masks(above, hidden, images, (rows, columns))
    _draw_distances(below.add_subplot(), report)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        figure.savefig(partial, format="png")
    return True


def _draw_masks(figure: Any, hidden: Tensor, images: Tensor | None, grid: tuple[int, int]) -> None:
    pixels = torch.ones(len(hidden), 3, *hidden.shape[1:])
    if images is not None:
        pixels[: len(images)] = to_rgb(images.float().cpu())[: len(hidden)]
    seen = pixels.masked_fill(hidden[:, None], GREY)
    for axes, image in zip_longest(figure.subplots(*grid, squeeze=False).flat, seen):
        axes.set(xticks=[], yticks=[])
        if image is None:
            axes.axis("off")
        else:
            axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest", vmin=0, vmax=1)


def _draw_distances(axes: Any, report: MaskReport) -> None:
    low, high = report.band
    axes.axhspan(low, high, color="C2", alpha=0.15, label=f"SimMIM's good runs: {low:.3g} to {high:.3g} px")
    for unit in _units(report):
        points = sorted((ratio, value) for (own, ratio), value in report.table.items() if own == unit)
        axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=f"units of {unit} px")
    label = f"these masks: {report.distance:.1f} px"
    axes.plot(report.ratio, report.distance, "k*", markersize=13, label=label)
    axes.set(
        yscale="log", xlabel="share of hidden pixels", ylabel="AvgDist, px", title=f"AvgDist of {report.kind} masks"
    )
    least, most = axes.get_ylim()
    axes.minorticks_off()
    axes.set_yticks([tick for tick in _TICKS if least <= tick <= most])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
