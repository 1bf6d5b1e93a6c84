"""One self-contained HTML page of the measurements: tables and pictures, all drawn from the CSV.

python benchmarks/run.py report [--csv CSV …] [--out report.html]
"""

from __future__ import annotations

import base64
import html
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import command, harness, plots  # noqa: E402
from benchmarks.plots import Row, faster, latest  # noqa: E402

COLUMNS = {
    "step": ("case", "dtype", "batch", "img_size", "ranks", "provider", "images_per_sec", "fastmim_faster",
             "forward_s", "backward_s", "optimizer_s", "mfu", "roofline_share", "joules_per_image", "loss"),
    "memory": ("case", "dtype", "batch", "provider", "peak_memory_gib", "memory_kind", "start_memory_gib",
               "nvml_memory_gib", "saved_mb_per_image"),
    "pretrain": ("case", "dtype", "batch", "provider", "images_per_sec", "fastmim_faster", "data_s", "wall_s",
                 "peak_memory_gib", "loss", "note"),
    "counts": ("case", "batch", "provider", "launches", "mb_per_image", "saved_mb_per_image", "gflop_per_image",
               "modelled_us_per_image"),
    "data": ("case", "provider", "images_per_sec", "ratio", "note"),
    "kernels": ("case", "dtype", "batch", "provider", "seconds", "ratio", "note"),
    "rivals": ("case", "dtype", "batch", "provider", "seconds", "ratio", "peak_memory_gib", "note"),
    "target": ("case", "dtype", "batch", "provider", "seconds", "ratio", "note"),
    "import": ("case", "seconds", "ratio"),
}  # fmt: skip
TITLES = {
    "step": "Training steps",
    "profile": "Where a step's time goes",
    "memory": "Peak memory",
    "pretrain": "Whole runs from JPEG files",
    "data": "Loading",
    "kernels": "Single operations",
    "rivals": "Window attention beside other people's",
    "target": "Normalised target",
    "import": "Import",
    "counts": "Counts, and a modelled H100 (not measured)",
}
CAPTIONS = {
    "speed": "Images a second of whole training steps: higher is faster; whiskers are the 20 % and 80 % quantiles",
    "phases": "Where the seconds of a step go, the providers of a case below each other: shorter is faster",
    "profile": "Seconds of a step by kind of op, under torch's profiler, which slows small ops down",
    "memory": "The most memory of a step by recomputation policy: lower is better",
    "runs": "Images a second of runs from JPEG files to checkpoints, decoding included: higher is faster",
    "speedups": "How many times as fast as the baseline, on a logarithmic axis: right of 1 is faster",
    "roofline": "Counted bytes and FLOPs of a step under the ceilings of an H100: modelled, no point is a measurement",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222 }
figure { margin: 1em 0; overflow-x: auto } figcaption { font-size: 14px } nav a { margin-right: 1em }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0 }
th, td { padding: 3px 9px; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
td.text, th.text { text-align: left } tr.own { background: #eef7ee }
img { max-width: 100%; height: auto } .scroll { overflow-x: auto } p.where { color: #555; font-size: 13px }
.headline { font-size: 1.3em } figure img { min-width: 640px; background: #fff }
@media (prefers-color-scheme: dark) {
  body { background: #161616; color: #ddd } a { color: #8ab4f8 } th, td { border-color: #444 }
  tr.own { background: #1d3323 } p.where { color: #aaa }
}
"""


def pictures(rows: list[Row]) -> dict[str, list[tuple[str, Any]]]:
    """Benchmark → (what it shows, figure)."""
    step, memory = latest(rows, "step"), latest(rows, "memory")
    pretrain, counts = latest(rows, "pretrain"), latest(rows, "counts")
    out: dict[str, list[tuple[str, Any]]] = {}
    if step:
        usual = at_usual_size(step)
        out["step"] = [
            (CAPTIONS["speed"], plots.grouped_bars(usual, "images_per_sec", "images/s", "Training steps")),
            (CAPTIONS["phases"], plots.phases(usual)),
        ]
        for axis, name in (("batch", "batch"), ("img_size", "image size"), ("ranks", "ranks")):
            out["step"] += [(f"Images a second by {name}, everything else the same", plots.scaling(step, axis, name))]
    profile = latest(rows, "profile")
    if profile:
        out["profile"] = [(CAPTIONS["profile"], plots.profile(profile))]
    if memory:
        bars = plots.grouped_bars(memory, "peak_memory_gib", "GiB", "Peak memory (dark: before the first step)",
                                  base="start_memory_gib")  # fmt: skip
        out["memory"] = [(CAPTIONS["memory"], bars)]
    if pretrain:
        title = "Whole runs from JPEG files"
        out["pretrain"] = [(CAPTIONS["runs"], plots.grouped_bars(pretrain, "images_per_sec", "images/s", title))]
    for name in ("data", "kernels", "rivals"):
        bars = plots.speedups(latest(rows, name), TITLES[name])
        out |= {name: [(CAPTIONS["speedups"], bars)]} if bars else {}
    if counts:
        out["counts"] = [(CAPTIONS["roofline"], plots.roofline(counts))]
    return {name: [(text, figure) for text, figure in found if figure is not None] for name, found in out.items()}


def at_usual_size(rows: list[Row]) -> list[Row]:
    """One batch, image size and number of ranks for each case and precision: the first that was measured."""
    first: dict[tuple[str, str], tuple[str, ...]] = {}
    for row in rows:
        first.setdefault((row["case"], row["dtype"]), tuple(row[k] for k in ("batch", "img_size", "ranks")))
    return [r for r in rows if first[r["case"], r["dtype"]] == tuple(r[k] for k in ("batch", "img_size", "ranks"))]


def table(rows: list[Row], columns: Sequence[str]) -> str:
    """HTML table; a column that is empty everywhere is left out, quantiles stand behind their median."""
    columns = [c for c in columns if any(cell(row, c) for row in rows)]
    text = {"case", "dtype", "provider", "memory_kind", "note"}
    kind = {c: ' class="text"' if c in text else "" for c in columns}
    head = "".join(f"<th{kind[c]}>{c.replace('_', ' ')}</th>" for c in columns)
    lines = []
    for row in rows:
        cells = "".join(f"<td{kind[c]}>{html.escape(cell(row, c))}</td>" for c in columns)
        lines.append(f"<tr{' class=own' if row['provider'].startswith('fastmim') else ''}>{cells}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>\n' + "\n".join(lines) + "</table></div>"


def cell(row: Row, column: str) -> str:
    """A value with its 20 % and 80 % quantiles where it has some."""
    if column == "fastmim_faster":
        ratio = faster(row)
        return "" if ratio is None else f"{ratio[0]:.2f}× [{ratio[1]:.2f}, {ratio[2]:.2f}]"
    value = str(row[column])
    if row.get(f"{column}_p20"):
        return f"{value} [{row[f'{column}_p20']}, {row[f'{column}_p80']}]"
    return value


def where(rows: list[Row]) -> str:
    """Machines, versions, commits and dates of a section, in one sentence each."""
    loads: dict[str, list[float]] = {}
    for r in rows:
        parts = (r["machine"], r["threads"] and f"{r['threads']} threads", f"torch {r['torch']}",
                 r["timm"] and f"timm {r['timm']}", r["reference"], f"commit {r['commit']}", r["date"])  # fmt: skip
        said = ", ".join(filter(None, parts))
        loads.setdefault(said, []).append(float(r["load_average"]))
    lines = [f"{said}; load average {min(own):.1f} to {max(own):.1f}" for said, own in loads.items()]
    return "".join(f'<p class="where">{html.escape(line)}</p>' for line in lines)


def headline(steps: list[Row]) -> str:
    """How many times as fast as each other provider a step is, over all cases, in one sentence."""
    found: dict[str, list[float]] = {}
    for row in at_usual_size(steps):
        ratio = faster(row)
        if ratio and not row["provider"].startswith("fastmim"):
            found.setdefault(row["provider"], []).append(ratio[0])
    if not found:
        return ""
    said = ", ".join(f"{min(own):.2f} to {max(own):.2f} times as fast as {name}" for name, own in found.items())
    return f'<p class="headline">A training step of fastmim is {html.escape(said)} (medians of the cases below).</p>'


def contents(rows: list[Row]) -> str:
    """Links to the sections that have rows."""
    links = (f'<a href="#{name}">{html.escape(title)}</a>' for name, title in TITLES.items() if latest(rows, name))
    return f"<nav>{' '.join(links)}</nav>"


def page(rows: list[Row]) -> str:
    """The whole page."""
    parts = [f'<!doctype html><html lang="en"><meta charset="utf-8">'
             f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>fastmim benchmarks</title>'
             f"<style>{STYLE}</style><body><h1>fastmim benchmarks</h1>", headline(latest(rows, "step")), contents(rows),
             "<p>Medians with 20 % and 80 % quantiles in brackets. “fastmim faster” is a provider's time over "
             "fastmim's, round by round. benchmarks/README.md says how everything is measured.</p>"]  # fmt: skip
    drawn = pictures(rows)
    for name, title in TITLES.items():
        own = latest(rows, name)
        if not own:
            continue
        parts.append(f'<h2 id="{name}">{html.escape(title)}</h2>')
        for text, figure in drawn.get(name, []):
            data = base64.b64encode(plots.png(figure)).decode()
            parts.append(f'<figure><img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'
                         f"<figcaption>{html.escape(text)}.</figcaption></figure>")  # fmt: skip
        parts += [table(own, COLUMNS[name]) if name in COLUMNS else "", where(own)]
    return "\n".join(parts) + "</body></html>\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("run.py report", __doc__)
    parser.add_argument("--csv", type=Path, nargs="+", help="measurements (default: measurements.csv beside the page)")
    parser.add_results("report.html", "the page")
    args = parser.parse_args(argv)
    files = args.csv or [args.out.with_name("measurements.csv")]
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise ValueError(f"--csv {missing[0]}: no such file; run `python benchmarks/run.py step` first, or give "
                         "--record for the committed measurements")  # fmt: skip
    rows = [row for path in files for row in harness.read_rows(path)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page(rows), encoding="utf-8")
    print(f"report: {args.out}")
    return 0


if __name__ == "__main__":
    command.exit_with("run.py report", main)
