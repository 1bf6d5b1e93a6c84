"""Numbers of runs over their steps, as SVG that takes the colours of the page."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Any, NamedTuple

from fastmim.evaluate.figure import empty_figure
from fastmim.report.runs import RunFiles

# One that no line has: it becomes the text colour of the page, light or dark.
_INK = "#010203"
COLOURS = ("#2a7fbf", "#d9702b", "#3a9d5d", "#b65fb0", "#c9a227", "#cc4c4c", "#4bb0b5", "#8a8f98")
"""Of the runs in their order: each has contrast enough on white and on black."""
_STYLES = ("-", "--", ":")
_NOT_MONITORS = {"step", "epoch", "step_time", "data_time"}


class Chart(NamedTuple):
    """A picture of some numbers.

    Attributes:
        title: what they are, with their unit.
        keys: of ``metrics.jsonl``, each with what a line of it is called.
        note: what a reader should know.
        is_amount: twice as high is twice as much: the axis begins at 0.
    """

    title: str
    keys: dict[str, str]
    note: str = ""
    is_amount: bool = False


CHARTS = (
    Chart("Loss", {"loss": "training", "val_loss": "held out", "ema_val_loss": "of averaged weights"}),
    Chart("k-NN top-1, %", {"knn_top1": ""}, "Of frozen features, on labelled images that the encoder never learns."),
    Chart("Held-out accuracy, %", {"val_top1": "top-1", "val_top5": "top-5"}),
    Chart("Held-out accuracy of averaged weights, %", {"ema_val_top1": "top-1", "ema_val_top5": "top-5"}),
    Chart("Training top-1, %", {"top1": ""}, "Of images as they are trained on, mixed ones included."),
    Chart("Calibration error, %", {"val_ece": "", "ema_val_ece": "of averaged weights"},
          "How far confidence is from accuracy: lower is better."),
    Chart("RankMe", {"rankme": ""}, "Effective number of directions of the features; a collapse shows as a fall to 1."),
    Chart("Images a second", {"images_per_sec": ""}, is_amount=True),
    Chart("Peak memory, GiB", {"peak_memory_gib": ""}, is_amount=True),
    Chart("Learning rate", {"lr": ""}),
    Chart("Gradient norm", {"grad_norm": ""}, "Before clipping."),
)  # fmt: skip


def charts_of(runs: Sequence[RunFiles]) -> Iterator[Chart]:
    """The charts that have numbers: the known ones, then one for each that an objective adds."""
    rows = (row for run in runs for row in run.rows)
    there = dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, (int, float)))
    known = {key for chart in CHARTS for key in chart.keys} | _NOT_MONITORS
    for chart in CHARTS:
        if there.keys() & chart.keys.keys():
            yield chart
    for key in there:
        if key not in known:
            yield Chart(key.replace("_", " "), {key: ""}, "A number that the objective watches.")


def draw(chart: Chart, runs: Sequence[RunFiles]) -> str | None:
    """``<svg …>`` of a chart, a colour a run; None where matplotlib is missing."""
    figure = empty_figure((4.6, 2.9), "curves in the page")
    if figure is None:
        return None
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}):
        axes = figure.add_subplot()
        for run, colour in zip(runs, cycle(COLOURS), strict=False):
            for (key, line), style in zip(chart.keys.items(), _STYLES, strict=False):
                _line(axes, run, key, label=_label(run, line, len(runs)), color=colour, linestyle=style)
        _dress(axes)
        if chart.is_amount:
            axes.set_ylim(0, 1.1 * axes.dataLim.y1 or 1)  # a level line stands off the frame
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")


def _label(run: RunFiles, line: str, runs: int) -> str:
    return " ".join(part for part in (run.name if runs > 1 else "", line) if part)


def _line(axes: Any, run: RunFiles, key: str, *, label: str, **style: Any) -> None:
    found = run.series(key)
    if found:
        # A name that begins with an underscore would be left out of the legend.
        few = len(found) < 12
        axes.plot(*zip(*found, strict=True), marker="o" if few else None, markersize=3, label=f"\u200b{label}", **style)


def _dress(axes: Any) -> None:
    axes.set_xlabel("step", color=_INK)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25, color=_INK)
    axes.tick_params(colors=_INK)
    axes.ticklabel_format(axis="y", style="plain" if max(map(abs, axes.get_ylim())) > 1e-3 else "sci", useOffset=False)
    for side in axes.spines.values():
        side.set_color(_INK)
    if any(line.get_label() != "\u200b" for line in axes.get_lines()):
        axes.legend(labelcolor=_INK, frameon=False, fontsize=9)
