"""Pictures of the measurements, drawn from the CSV rows alone."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure

from fastmim.plan.hardware import MEASURED as GPUS

Row = dict[str, Any]
KEY = ("benchmark", "case", "dtype", "batch", "img_size", "ranks", "device", "machine", "provider")
NOTED = ("step", "profile", "pretrain")  # whose note says what was measured, not what came out
COLOURS = {"fastmim": "#1b7837", "timm": "#4393c3", "microsoft-simmim": "#b2182b", "microsoft-swin": "#d6604d"}
OTHERS = ("#8073ac", "#b35806", "#666666", "#35978f", "#dfc27d", "#c51b7d", "#2d004b")


def latest(rows: Sequence[Row], benchmark: str) -> list[Row]:
    """Rows of a benchmark; of those that measured the same thing, the last one."""
    key = (*KEY, "note") if benchmark in NOTED else KEY
    kept = {tuple(row[k] for k in key): row for row in rows if row["benchmark"] == benchmark}
    return list(kept.values())


def number(row: Row, column: str) -> float:
    """A column as a number; NaN where it is empty."""
    return float(row[column]) if row[column] not in ("", None) else float("nan")


def faster(row: Row) -> tuple[float, float, float] | None:
    """How many times faster ours was than a provider: median and quantiles; None where that was not compared."""
    if row["baseline"] != "fastmim" or not row["ratio"] or row["provider"] == "fastmim":
        return None
    return 1 / number(row, "ratio"), 1 / number(row, "ratio_p80"), 1 / number(row, "ratio_p20")


def label(row: Row) -> str:
    """Case, precision and batch of a row in two lines."""
    ranks = f" ×{row['ranks']}" if row["ranks"] not in ("", "1") else ""
    return f"{row['case']}\n{row['dtype']}, batch {row['batch']}{ranks}"


def colour(provider: str, index: int) -> str:
    """One colour per provider on every picture; a compiled one has its eager one's."""
    return COLOURS.get(provider.removesuffix("-compiled"), OTHERS[index % len(OTHERS)])


def _names(rows: Sequence[Row], column: Callable[[Row], str]) -> list[str]:
    return list(dict.fromkeys(column(row) for row in rows))


def grouped_bars(rows: Sequence[Row], column: str, unit: str, title: str, base: str = "") -> Figure:
    """A group of bars per case, a bar per provider; quantiles as whiskers, ``base`` as the dark foot of a bar."""
    groups, providers = _names(rows, label), _names(rows, lambda row: row["provider"])
    figure = Figure(figsize=(max(6.0, 1.9 * len(groups)), 4.0), layout="constrained")
    axes = figure.subplots()
    width = 0.85 / len(providers)
    for i, provider in enumerate(providers):
        own = [row for row in rows if row["provider"] == provider]
        places = [groups.index(label(row)) + (i - (len(providers) - 1) / 2) * width for row in own]
        values = [number(row, column) for row in own]
        hatch = "//" if provider.endswith("-compiled") else None
        axes.bar(places, values, width * 0.92, label=provider, color=colour(provider, i), hatch=hatch,
                 edgecolor="white", linewidth=0.5)  # fmt: skip
        if base:
            axes.bar(places, [number(row, base) for row in own], width * 0.92, color="black", alpha=0.25)
        if own and f"{column}_p20" in own[0]:
            low = [v - number(row, f"{column}_p20") for v, row in zip(values, own, strict=True)]
            high = [number(row, f"{column}_p80") - v for v, row in zip(values, own, strict=True)]
            axes.errorbar(places, values, [[max(x, 0) for x in low], [max(x, 0) for x in high]], fmt="none",
                          ecolor="black", elinewidth=1, capsize=2)  # fmt: skip
    axes.set_xticks(range(len(groups)), groups, fontsize=8)
    _finish(axes, unit, title)
    return figure


def _line(row: Row) -> str:
    return f"{row['provider']}   {row['case']} {row['dtype']}"


def phases(rows: Sequence[Row]) -> Figure:
    """Forward, backward and optimiser of each provider's step, those of a case below each other."""
    cases = _names(rows, label)
    rows = sorted(rows, key=lambda row: cases.index(label(row)))
    parts = {phase: [number(row, f"{phase}_s") for row in rows] for phase in ("forward", "backward", "optimizer")}
    return _stacked([_line(row) for row in rows], parts, "Phases of a step, medians")


def profile(rows: Sequence[Row]) -> Figure:
    """Where the time of each provider's step goes, by kind of op."""
    lines, kinds = _names(rows, _line), _names(rows, lambda row: row["note"])
    spent = {(_line(row), row["note"]): number(row, "seconds") for row in rows}
    parts = {kind: [spent.get((line, kind), 0.0) for line in lines] for kind in kinds}
    return _stacked(lines, parts, "Time of a step by kind of op, under the profiler")


def _stacked(lines: Sequence[str], parts: dict[str, list[float]], title: str) -> Figure:
    figure = Figure(figsize=(8.0, 1.3 + 0.26 * len(lines)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(lines)
    shades = ("#4393c3", "#d6604d", "#b8a52d", "#1b7837", *OTHERS)
    for shade, (name, values) in zip(itertools.cycle(shades), parts.items(), strict=False):
        axes.barh(range(len(lines)), values, left=left, color=shade, label=name)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(range(len(lines)), lines, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("seconds a step")
    axes.set_title(title)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def roofline(rows: Sequence[Row]) -> Figure:
    """Counted steps under the ceilings of an H100: modelled, no point is a measurement."""
    gpu = GPUS[0]
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    ridge = gpu.flops / gpu.bandwidth
    span = [4.0, ridge, 2000.0]
    axes.plot(span, [min(x * gpu.bandwidth, gpu.flops) / 1e12 for x in span], color="black", linewidth=1)
    marks = dict(zip(_names(rows, lambda row: row["case"]), "osD^vP*X", strict=False))
    for i, row in enumerate(rows):
        flops = number(row, "gflop_per_image") * 1e9
        x, y = flops / (number(row, "mb_per_image") * 1e6), flops / number(row, "modelled_us_per_image") / 1e6
        axes.plot(x, y, marks.get(row["case"], "o"), color=colour(row["provider"], i), markersize=8,
                  label=f"{row['provider']}, {row['case']}")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte of memory traffic")
    _finish(axes, "TFLOP/s", f"Modelled roofline of a step ({gpu.name}, counted, not measured)")
    return figure


def scaling(rows: Sequence[Row], axis: str, name: str) -> Figure | None:
    """Images/s over batch, image size or ranks; None where nothing was measured at two values."""
    others = [k for k in ("case", "dtype", "batch", "img_size", "ranks", "device", "machine", "provider") if k != axis]
    lines: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        lines.setdefault(tuple(row[k] for k in others), []).append(row)
    lines = {key: own for key, own in lines.items() if len({row[axis] for row in own}) > 1}
    if not lines:
        return None
    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for i, own in enumerate(lines.values()):
        own = sorted(own, key=lambda row: float(row[axis]))
        x, y = [float(row[axis]) for row in own], [number(row, "images_per_sec") for row in own]
        style = {"fp32": "-", "bf16": "--"}.get(own[0]["dtype"], "-")
        axes.plot(x, y, style, marker="o", color=colour(own[0]["provider"], i),
                  label=f"{own[0]['provider']}, {own[0]['case']} {own[0]['dtype']}")  # fmt: skip
    axes.set_xlabel(name)
    _finish(axes, "images/s", f"Scaling over {name}")
    return figure


def speedups(rows: Sequence[Row], title: str) -> Figure | None:
    """How many times as fast as the baseline every provider is, a line per case; None where nothing is compared."""
    rows = [row for row in rows if row["ratio"] and row["provider"] != row["baseline"]]
    if not rows:
        return None
    cases, providers = _names(rows, _case), _names(rows, lambda row: row["provider"])
    height = 0.85 / len(providers)
    figure = Figure(figsize=(8.0, 1.5 + 0.28 * len(cases) * max(1.0, len(providers) / 2)), layout="constrained")
    axes = figure.subplots()
    for i, provider in enumerate(providers):
        own = {_case(row): number(row, "ratio") for row in rows if row["provider"] == provider}
        bars = axes.barh([cases.index(case) + i * height for case in own], list(own.values()), height, label=provider,
                         color=colour(provider, i))  # fmt: skip
        axes.bar_label(bars, fmt="%.2f", fontsize=6, padding=2)
    axes.set_yticks([i + 0.425 - height / 2 for i in range(len(cases))], cases, fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)
    axes.set_xlabel(f"times as fast as {', '.join(_names(rows, lambda row: row['baseline']))}")
    axes.set_title(title)
    axes.legend(fontsize=7)
    return figure


def shares(rows: Sequence[Row], title: str) -> Figure:
    """What each row reaches of a copy's bandwidth and of a product's rate, measured in the same run."""
    figure = Figure(figsize=(8.0, 1.5 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for i, (column, name) in enumerate((("roofline_share", "of a copy"), ("matmul_share", "of a product"))):
        places = [place + 0.4 * i for place in range(len(rows))]
        axes.barh(places, [number(row, column) for row in rows], 0.38, label=name, color=OTHERS[i])
    axes.set_yticks([place + 0.2 for place in range(len(rows))], [row["case"] for row in rows], fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_title(title)
    axes.legend(fontsize=7)
    return figure


def _case(row: Row) -> str:
    return f"{row['case']} {row['dtype']} b{row['batch']} {row['device']}"


def _finish(axes: Any, unit: str, title: str) -> None:
    axes.set_ylabel(unit)
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    if axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
