"""The picture of the measurements that is no bar chart, drawn from the CSV rows alone."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

from benchmarks.bars import colour
from benchmarks.rows import Row, names, number
from fastmim.plan.hardware import MEASURED as GPUS

INK = "#010203"
"""Stands for the page's text colour in what matplotlib draws."""
MARKS, SIGNS = "osD^vP*X", "●■◆▲▼✚★✖"
"""Of the cases, as matplotlib calls them and as text."""
FONTS = {"svg.fonttype": "none", "svg.hashsalt": "fastmim", "font.size": 11, "font.family": "sans-serif"}


def roofline(rows: Sequence[Row]) -> str:
    """Counted steps under the ceilings of an H100, as SVG with a legend: modelled, no point is a measurement.

    Both axes are logarithmic, so that a bandwidth is a straight line.
    """
    cases, providers = names(rows, lambda row: row["case"]), names(rows, lambda row: row["provider"])
    shades = [colour(provider, i) for i, provider in enumerate(providers)]
    keys = [f'<span><i style="--c:var(--{shade})"></i>{html.escape(provider)}</span>'
            for shade, provider in zip(shades, providers, strict=True)]  # fmt: skip
    keys += [f"<span>{sign} {html.escape(case)}</span>" for case, sign in zip(cases, SIGNS, strict=False)]
    with matplotlib.rc_context(FONTS):
        drawing = svg(_points_under_the_roof(rows, cases, providers), shades)
    return f'<div class="legend">{"".join(keys)}</div>{drawing}'


def _points_under_the_roof(rows: Sequence[Row], cases: list[str], providers: list[str]) -> Figure:
    gpu = GPUS[0]
    figure = Figure(figsize=(4.4, 3.2), layout="constrained")
    axes = figure.subplots()
    span = [4.0, gpu.flops / gpu.bandwidth, 2000.0]
    axes.plot(span, [min(x * gpu.bandwidth, gpu.flops) / 1e12 for x in span], color=INK, linewidth=1)
    marks = dict(zip(cases, MARKS, strict=False))
    for row in rows:
        flops = number(row, "gflop_per_image") * 1e9
        x, y = flops / (number(row, "mb_per_image") * 1e6), flops / number(row, "modelled_us_per_image") / 1e6
        axes.plot(x, y, marks.get(row["case"], "o"), color=_stand_in(providers.index(row["provider"])), markersize=7)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of memory traffic", ylabel="TFLOP/s")
    axes.grid(alpha=0.3, color=INK)
    axes.tick_params(which="both", colors=INK)
    for part in (axes.xaxis.label, axes.yaxis.label, *axes.spines.values()):
        part.set_color(INK)
    return figure


def _stand_in(index: int) -> str:
    return f"#0102{16 + index:02x}"


def svg(figure: Figure, shades: Sequence[str]) -> str:
    """The figure as an ``<svg>`` whose text is text, in the colours of the page that it stands in."""
    buffer = io.StringIO()
    about = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=about)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    for index, shade in enumerate(shades):
        text = text.replace(_stand_in(index), f"var(--{shade})")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", text)
    return re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
