"""Bar charts of the CSV rows as HTML: text of the page's own size in light and dark, on any width.

All bars of a chart start at 0 and share one linear axis. The page that holds them has :data:`STYLE` in it.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.rows import Row, label, names, number

COLOURS = {"fastmim": "own", "timm": "timm", "microsoft-simmim": "simmim", "microsoft-swin": "swin"}
OTHERS = tuple(f"c{i}" for i in range(8))
"""Names of the style sheet's colours, of which each has a shade for light and one for dark pages."""
CUT = 4.0
"""Times as fast as the baseline: what is beyond would leave no width to the others."""

STYLE = """
:root { --own: #1b7837; --timm: #4393c3; --simmim: #b2182b; --swin: #d6604d; --c0: #8073ac; --c1: #b35806;
  --c2: #777777; --c3: #35978f; --c4: #b8a52d; --c5: #c51b7d; --c6: #5e4fa2; --c7: #66a61e;
  --track: #f0f0f0; --muted: #555; --ink: #222; --paper: #fff; --rule: #ddd; --pale: #eef7ee; --link: #0b57d0 }
.groups { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 1.1em 2.2em }
.group { max-width: 720px } .group h3 { font-size: 15px; margin: 0 0 .2em }
.bar, .axis { display: grid; grid-template-columns: 134px 1fr 64px; column-gap: 8px; align-items: center;
  font-size: 14px; line-height: 1.45 }
.axis { font-size: 13px; color: var(--muted) } .axis > span { grid-column: 2; display: flex;
  justify-content: space-between }
.bar b { font-weight: 400; overflow-wrap: anywhere } .bar .own { font-weight: 700 }
.bar em { font-style: normal; text-align: right; font-variant-numeric: tabular-nums }
.track { position: relative; height: 1em; background: var(--track) }
.track i { position: absolute; top: 0; bottom: 0; background: var(--c) }
.track .hatched { background-image: repeating-linear-gradient(135deg, transparent 0 4px,
  rgba(255,255,255,.45) 4px 7px) }
.track .foot { background: rgba(0,0,0,.35) }
.track .spread { top: calc(50% - 1px); bottom: auto; height: 2px; background: var(--ink) }
.track .line { width: 0; border-left: 2px solid var(--ink); top: -2px; bottom: -2px; background: none }
.track .cut { clip-path: polygon(0 0, calc(100% - .6em) 0, 100% 50%, calc(100% - .6em) 100%, 0 100%) }
.legend { display: flex; flex-wrap: wrap; gap: .1em 1.2em; font-size: 14px; margin: .3em 0 .8em }
.legend i { display: inline-block; width: .9em; height: .9em; margin-right: .4em; background: var(--c);
  vertical-align: -1px }
.long .bar, .long .axis { grid-template-columns: 1fr 64px } .long .bar b { grid-column: 1 / 3 }
.long .axis > span { grid-column: 1 }
@media (max-width: 480px) {
  .groups:not(.long) .bar, .groups:not(.long) .axis { grid-template-columns: 130px 1fr 56px }
}
@media (prefers-color-scheme: dark) {
  :root { --own: #5cb974; --timm: #6baed6; --simmim: #e5596b; --swin: #f08a6c; --c0: #a79bd0; --c1: #e08b3a;
    --c2: #a6a6a6; --c3: #5cc4bb; --c4: #d6c44c; --c5: #e76bb0; --c6: #9488d8; --c7: #8fce4a;
    --track: #2a2a2a; --muted: #aaa; --ink: #ddd; --paper: #161616; --rule: #444; --pale: #1d3323; --link: #8ab4f8 }
}
"""
PAGE_STYLE = STYLE + """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: var(--ink);
  background: var(--paper) }
a { color: var(--link) } figure { margin: 1em 0 1.6em } figcaption { font-size: 15px; margin-top: .5em }
table { border-collapse: collapse; font-size: 14px; margin: 1em 0 } .scroll { overflow-x: auto }
th, td { padding: 3px 9px; border-bottom: 1px solid var(--rule) }
"""
"""Of a whole page: its text, figures, and tables, which scroll inside themselves."""


@dataclass(frozen=True)
class Bar:
    """One bar: what it is called, its parts (colour, value) from 0 on, its text, and what is drawn onto it."""

    name: str
    parts: tuple[tuple[str, float], ...]
    text: str
    spread: tuple[float, float] | None = None
    foot: float = 0.0

    @property
    def end(self) -> float:
        return sum(value for _, value in self.parts)


def chart(groups: dict[str, list[Bar]], unit: str, *, line: float | None = None, cut: float = math.inf,
          legend: dict[str, str] | None = None, long: bool = False) -> str:
    """Groups of bars, side by side where the page is wide enough.

    Args:
        groups: Heading → bars; an empty one is left out.
        unit: Behind the end of the axis.
        line: Where every bar is crossed by a line; the axis reaches it.
        cut: End of the axis at most; a longer bar ends in a point.
        legend: Name → colour of the parts.
        long: Names stand above their bars.
    """
    ends = [max(bar.end, *(bar.spread or ())) if bar.spread else bar.end for bars in groups.values() for bar in bars]
    most = min(max([*ends, line or 0.0]), cut) or 1.0
    keys = "".join(f'<span><i style="--c:var(--{c})"></i>{html.escape(n)}</span>' for n, c in (legend or {}).items())
    axis = f'<div class="axis"><span><span>0</span><span>{_short(most)} {html.escape(unit)}</span></span></div>'
    parts = [f'<div class="legend">{keys}</div>' if keys else "", f'<div class="groups{" long" if long else ""}">']
    for heading, bars in groups.items():
        title = f"<h3>{html.escape(heading)}</h3>" if heading else ""
        parts.append(f'<div class="group">{title}{"".join(_bar(bar, most, line) for bar in bars)}{axis}</div>')
    return "\n".join(filter(None, parts)) + "</div>"


def _bar(bar: Bar, most: float, line: float | None) -> str:
    drawn, start, cut = [], 0.0, " cut" if bar.end > most * 1.001 else ""
    hatched = " hatched" if bar.name.endswith("-compiled") else ""
    for colour, value in bar.parts:
        place = f"left:{_share(start, most)};width:{_share(min(value, most - start), most)}"
        drawn.append(f'<i class="part{hatched}{cut}" style="{place};--c:var(--{colour})"></i>')
        start = min(start + value, most)
    if bar.foot:
        drawn.append(f'<i class="foot" style="left:0;width:{_share(bar.foot, most)}"></i>')
    if bar.spread:
        low, high = bar.spread
        drawn.append(f'<i class="spread" style="left:{_share(low, most)};width:{_share(high - low, most)}"></i>')
    if line is not None:
        drawn.append(f'<i class="line" style="left:{_share(line, most)}"></i>')
    own = ' class="own"' if bar.name.startswith("fastmim") else ""
    return (f'<div class="bar"><b{own}>{html.escape(bar.name)}</b><span class="track">{"".join(drawn)}</span>'
            f"<em>{html.escape(bar.text)}</em></div>\n")


def _share(value: float, most: float) -> str:
    return f"{100 * max(value, 0.0) / most:.2f}%"


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def colour(provider: str, index: int) -> str:
    """One colour per provider on every picture; a compiled one has its eager one's."""
    return COLOURS.get(provider.removesuffix("-compiled"), OTHERS[index % len(OTHERS)])


def grouped(rows: Sequence[Row], column: str, unit: str, base: str = "") -> str:
    """A group of bars per case, a bar per provider; quantiles as whiskers, ``base`` as the dark foot of a bar."""
    providers, groups = names(rows, lambda row: row["provider"]), {}
    for row in rows:
        if not row[column]:
            continue
        value, text = number(row, column), str(row[column])
        own = ((colour(row["provider"], providers.index(row["provider"])), value),)
        known = bool(row.get(f"{column}_p20"))
        spread = (number(row, f"{column}_p20"), number(row, f"{column}_p80")) if known else None
        foot = number(row, base) if base else 0.0
        groups.setdefault(label(row), []).append(Bar(row["provider"], own, text, spread, foot))
    return chart(groups, unit)


def phases(rows: Sequence[Row]) -> str:
    """Forward, backward and optimiser of each provider's step."""
    kinds, groups = {"forward": "timm", "backward": "swin", "optimizer": "c4"}, {}
    for row in rows:
        parts = tuple((shade, number(row, f"{phase}_s")) for phase, shade in kinds.items() if row[f"{phase}_s"])
        bar = Bar(row["provider"], parts, f"{sum(v for _, v in parts):.3g}")
        groups.setdefault(label(row), []).append(bar)
    return chart(groups, "s", legend=kinds)


def profile(rows: Sequence[Row]) -> str:
    """Where the time of each provider's step goes, by kind of op."""
    kinds = dict(zip(names(rows, lambda row: row["note"]), itertools.cycle(("timm", "swin", *OTHERS[4:], *OTHERS[:4])),
                     strict=False))  # fmt: skip
    spent: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for kind, shade in kinds.items():  # the same order in every bar
        for row in rows:
            if row["note"] == kind:
                spent.setdefault((label(row), row["provider"]), []).append((shade, number(row, "seconds")))
    groups: dict[str, list[Bar]] = {}
    for (heading, provider), parts in spent.items():
        groups.setdefault(heading, []).append(Bar(provider, tuple(parts), f"{sum(v for _, v in parts):.3g}"))
    return chart(groups, "s", legend=kinds)


def scaling(rows: Sequence[Row], axis: str, name: str) -> str:
    """Images/s over batch, image size or ranks; empty where nothing was measured at two values."""
    others = [k for k in ("case", "dtype", "batch", "img_size", "ranks", "device", "machine") if k != axis]
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[k] for k in others), []).append(row)
    groups: dict[str, list[Bar]] = {}
    providers = names(rows, lambda row: row["provider"])
    for own in found.values():
        several = [p for p in providers if len({row[axis] for row in own if row["provider"] == p}) > 1]
        for row in sorted(own, key=lambda row: float(row[axis] or 0)):
            if row["provider"] in several:
                shade = colour(row["provider"], providers.index(row["provider"]))
                bar = Bar(row["provider"], ((shade, number(row, "images_per_sec")),), str(row["images_per_sec"]))
                groups.setdefault(f"{row['case']} {row['dtype']}, {name} {row[axis]}", []).append(bar)
    return chart(groups, "images/s") if groups else ""


def speedups(rows: Sequence[Row]) -> str:
    """How many times as fast as the baseline every provider is, a line at 1; empty where nothing is compared."""
    rows = [row for row in rows if row["ratio"] and row["provider"] != row["baseline"]]
    providers = names(rows, lambda row: row["provider"])
    one, groups = len(providers) == 1, {}
    for row in rows:
        shade = colour(row["provider"], providers.index(row["provider"]))
        ratio = number(row, "ratio")
        bar = Bar(_case(row) if one else row["provider"], ((shade, ratio),), f"{ratio:.2f}×")
        groups.setdefault(f"{row['provider']} beside {row['baseline']}" if one else _case(row), []).append(bar)
    baselines = ", ".join(names(rows, lambda row: row["baseline"]))
    return chart(groups, f"× {baselines}", line=1.0, cut=CUT, long=one) if rows else ""


def speedups_show(rows: Sequence[Row]) -> str:
    """What :func:`speedups` shows, in one sentence."""
    rows = [row for row in rows if row["ratio"]]
    cut = any(number(row, "ratio") > CUT for row in rows)
    baselines = " or ".join(names(rows, lambda row: row["baseline"]))
    return (f"How many times as fast as {baselines}, from 0 on: beyond the line at 1 is faster"
            + (f"; a bar beyond {CUT:g} ends in a point" if cut else ""))  # fmt: skip


def figure(text: str, picture: str, kind: str = "") -> str:
    """A picture with the sentence that it shows."""
    return f"<figure{kind}>{picture}<figcaption>{html.escape(text)}.</figcaption></figure>"


def shares(rows: Sequence[Row]) -> str:
    """What each row reaches of a copy's bandwidth and of a product's rate, measured in the same run, a line at 1."""
    kinds = {"roofline_share": ("of a copy", "c0"), "matmul_share": ("of a product", "c1")}
    groups: dict[str, list[Bar]] = {}
    for row in rows:
        heading = " ".join(filter(None, (row["case"], row["dtype"], row["provider"])))
        groups[heading] = [Bar(said, ((shade, number(row, column)),), f"{number(row, column):.2f}")
                           for column, (said, shade) in kinds.items() if row[column]]  # fmt: skip
    return chart(groups, "", line=1.0)


def _case(row: Row) -> str:
    return " ".join(filter(None, (row["case"], row["dtype"], row["batch"] and f"b{row['batch']}", row["device"])))
