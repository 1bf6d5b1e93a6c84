"""One self-contained HTML page of the measurements: the headline with its picture, then tables and pictures,
all drawn from the CSV.

python benchmarks/run.py report [--csv CSV …] [--out report.html]
"""

from __future__ import annotations

import html
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import bars, command, harness  # noqa: E402
from benchmarks.rows import Row, at_usual_size, faster, label, latest, names  # noqa: E402

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
    "speed": "Images a second of whole training steps: longer is faster; thin lines are the 20 % and 80 % quantiles",
    "phases": "Where the seconds of a step go: shorter is faster",
    "scaling": "Images a second by {}, everything else the same: longer is faster",
    "profile": "Seconds of a step by kind of op, under torch's profiler, which slows small ops down",
    "memory": "The most memory of a step in GiB by recomputation policy, the dark foot before the first step: "
              "shorter is better",
    "runs": "Images a second of runs from JPEG files to checkpoints, decoding included: longer is faster",
    "roofline": "Counted bytes and FLOPs of a step under the ceilings of an H100, both axes logarithmic as rooflines "
                "are: modelled, no point is a measurement",
}  # fmt: skip
STYLE = bars.PAGE_STYLE + """
nav { line-height: 2 } nav a { margin-right: 1em } .headline { font-size: 1.25em } .first { max-width: 640px }
th, td { text-align: right; white-space: nowrap } td.text, th.text { text-align: left }
tr.own { background: var(--pale) }
p.where { color: var(--muted); font-size: 14px; overflow-wrap: anywhere }
svg { width: 100%; max-width: 620px; height: auto; display: block }
"""
SCALES = {"batch": "batch", "img_size": "image size", "ranks": "ranks"}


def pictures(rows: list[Row]) -> dict[str, list[tuple[str, str]]]:
    """Benchmark → (what it shows, HTML of the picture), those without a picture left out."""
    own = {name: latest(rows, name) for name in TITLES}
    usual = at_usual_size(own["step"])
    out = {name: [(bars.speedups_show(own[name]), bars.speedups(own[name]))] for name in ("data", "kernels", "rivals")}
    out["step"] = [(CAPTIONS["speed"], bars.grouped(usual, "images_per_sec", "images/s")),
                   (CAPTIONS["phases"], bars.phases(usual))]  # fmt: skip
    out["step"] += [(CAPTIONS["scaling"].format(said), bars.scaling(own["step"], axis, said))
                    for axis, said in SCALES.items()]  # fmt: skip
    out["profile"] = [(CAPTIONS["profile"], bars.profile(own["profile"]))]
    out["memory"] = [(CAPTIONS["memory"], bars.grouped(own["memory"], "peak_memory_gib", "GiB", "start_memory_gib"))]
    out["pretrain"] = [(CAPTIONS["runs"], bars.grouped(own["pretrain"], "images_per_sec", "images/s"))]
    if own["counts"]:
        from benchmarks import plots  # which needs matplotlib

        out["counts"] = [(CAPTIONS["roofline"], plots.roofline(own["counts"]))]
    return {name: [(text, picture) for text, picture in out.get(name, []) if own[name] and picture] for name in TITLES}


def table(rows: list[Row], columns: Sequence[str]) -> str:
    """HTML table, the providers of a case below each other; a column that is empty everywhere is left out."""
    cases = names(rows, _setting)
    rows = sorted(rows, key=lambda row: cases.index(_setting(row)))
    columns = [c for c in columns if any(cell(row, c) for row in rows)]
    text = {"case", "dtype", "provider", "memory_kind", "note"}
    kind = {c: ' class="text"' if c in text else "" for c in columns}
    head = "".join(f"<th{kind[c]}>{c.replace('_', ' ')}</th>" for c in columns)
    lines = []
    for row in rows:
        cells = "".join(f"<td{kind[c]}>{html.escape(cell(row, c))}</td>" for c in columns)
        lines.append(f"<tr{' class=own' if row['provider'].startswith('fastmim') else ''}>{cells}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>\n' + "\n".join(lines) + "</table></div>"


def _setting(row: Row) -> str:
    return f"{label(row)} {row['img_size']}"


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
    """How many times as fast as all other providers a step is, in one sentence, and the first case as a picture."""
    usual = at_usual_size(steps)
    found: dict[str, list[float]] = {}
    for row in usual:
        ratio = faster(row)
        if ratio and not row["provider"].startswith("fastmim"):
            found.setdefault(row["provider"], []).append(ratio[0])
    if not found:
        return ""
    every = _range([ratio for own in found.values() for ratio in own])
    each = ", ".join(f"{name} {_range(own)}" for name, own in found.items())
    first = [row for row in usual if label(row) == label(usual[0])]
    text = f"Images a second of a training step of {label(usual[0])}: longer is faster"
    return (f'<p class="headline">A training step of fastmim is {every} times as fast as others\'.</p>'
            + bars.figure(text, bars.grouped(first, "images_per_sec", "images/s"), ' class="first"')
            + f"<p>Times as fast, least to most of the cases below (medians): {html.escape(each)}.</p>")


def _range(ratios: list[float]) -> str:
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return low if low == high else f"{low} to {high}"


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
        parts += [bars.figure(text, picture) for text, picture in drawn[name]]
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
    command.write_whole(args.out, page(rows))
    print(f"report: {args.out}")
    return 0


if __name__ == "__main__":
    command.exit_with("run.py report", main)
