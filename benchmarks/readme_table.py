"""The README's tables of measured and of modelled numbers, written from the committed CSV files and never by hand.

python benchmarks/readme_table.py [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import command, harness  # noqa: E402
from benchmarks.rows import Row, faster, latest, number  # noqa: E402

CSV = harness.RESULTS / "measurements.csv"
ROOFS = harness.RESULTS / "op_count.csv"
OPPONENTS = {"timm": "timm", "timm-compiled": "timm compiled", "microsoft": "Microsoft"}


def opponent(row: Row) -> str:
    """Column of a provider: Microsoft's two repositories share one."""
    return "microsoft" if row["provider"].startswith("microsoft") else row["provider"]


def side_by_side(rows: list[Row], column: str, sign: int) -> dict[tuple[str, ...], dict[str, Row]]:
    """Setting → column → row; of Microsoft's two repositories the better one, which is the harder to beat."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        own = found.setdefault(setting(row), {})
        old = own.get(opponent(row))
        if old is None or sign * number(row, column) > sign * number(old, column):
            own[opponent(row)] = row
    return found


def setting(row: Row) -> tuple[str, ...]:
    """What must be the same for two rows to be compared."""
    return tuple(row[k] for k in ("case", "dtype", "batch", "img_size", "ranks", "device", "machine", "threads"))


def table(rows: list[Row], benchmark: str) -> list[str]:
    """Lines of Markdown: our images/s, and how many times faster it is than each opponent."""
    found = [f for f in side_by_side(latest(rows, benchmark), "images_per_sec", 1).values() if "fastmim" in f]
    names = [n for n in OPPONENTS if any(n in f for f in found)]
    heads = "".join(f" vs {OPPONENTS[n]} |" for n in names)
    lines = [f"| model | precision | batch | fastmim, images/s |{heads}", "|---|---|---|---|" + "---|" * len(names)]
    for f in found:
        row, speeds = f["fastmim"], [faster(f[n]) if n in f else None for n in names]
        cells = "".join(" – |" if s is None else f" {s[0]:.2f}× [{s[1]:.2f}, {s[2]:.2f}] |" for s in speeds)
        rate = f"{row['images_per_sec']} [{row['images_per_sec_p20']}, {row['images_per_sec_p80']}]"
        lines.append(f"| {model(row, rows)} | {row['dtype']} | {row['batch']} | {rate} |{cells}")
    return lines


def model(row: Row, rows: list[Row]) -> str:
    """The case, with its image size and ranks where they are not those that it was first measured at."""
    first = next(r for r in rows if (r["benchmark"], r["case"]) == (row["benchmark"], row["case"]))
    size = "" if row["img_size"] == first["img_size"] else f", {row['img_size']} px"
    return row["case"] + size + ("" if row["ranks"] in ("", first["ranks"]) else f", {row['ranks']} ranks")


def loading(rows: list[Row]) -> list[str]:
    """Lines of Markdown: images/s of every loader, and its speed over the reference's composition."""
    lines = ["| loader | images/s | x the reference's | |", "|---|---|---|---|"]
    for row in latest(rows, "data"):
        ratio = f"{float(row['ratio']):.2f} [{float(row['ratio_p20']):.2f}, {float(row['ratio_p80']):.2f}]"
        lines.append(f"| `{row['provider']}` | {row['images_per_sec']} | {ratio} | {row['note'].partition(';')[0]} |")
    return lines


def memory(rows: list[Row]) -> list[str]:
    """Lines of Markdown: peak memory of ours and its share of each opponent's."""
    found = [f for f in side_by_side(latest(rows, "memory"), "peak_memory_gib", -1).values() if "fastmim" in f]
    names = [n for n in OPPONENTS if any(n in f for f in found)]
    heads = "".join(f" × {OPPONENTS[n]} |" for n in names)
    lines = [f"| model | precision | batch | fastmim, peak GiB |{heads}", "|---|---|---|---|" + "---|" * len(names)]
    for f in found:
        own, peak = f["fastmim"], number(f["fastmim"], "peak_memory_gib")
        shares = [f"{peak / number(f[n], 'peak_memory_gib'):.2f}" if n in f else "–" for n in names]
        cells = "".join(f" {share} |" for share in shares)
        lines.append(f"| {model(own, rows)} | {own['dtype']} | {own['batch']} | {peak:.2f} |{cells}")
    return lines


def counted(rows: list[Row]) -> list[str]:
    """Lines of Markdown: launches, traffic, saved bytes and modelled time, each provider's beside ours."""
    columns = {"launches": "launches", "mb_per_image": "MB/image", "saved_mb_per_image": "saved MB/image",
               "modelled_us_per_image": "modelled µs/image"}  # fmt: skip
    lines = [f"| model | batch | provider | {' | '.join(columns.values())} |", "|---" * (3 + len(columns)) + "|"]
    for row in latest(rows, "counts"):
        values = " | ".join(str(row[c]) for c in columns)
        lines.append(f"| {row['case']} | {row['batch']} | {row['provider']} | {values} |")
    return lines


def text(rows: list[Row]) -> str:
    """What stands between the markers."""
    parts = []
    for title, lines in (
        ("Training steps", table(rows, "step")),
        ("Whole runs of `fastmim pretrain` from JPEG files", table(rows, "pretrain")),
        ("Peak memory of a training step", memory(rows)),
        ("Loading JPEG photographs of 500x375 px, 192 px crops", loading(rows)),
        ("Counted on fake tensors (bf16, forward and backward with the weights' casts); the time is a roofline of an "
         "H100, no measurement", counted(rows)),
    ):
        if len(lines) > 2:
            parts.append("\n".join([f"{title}:", "", *lines]))
    timed = [r for name in ("step", "memory", "pretrain", "data") for r in latest(rows, name)]
    rows = [*timed, *latest(rows, "counts")]
    said = dict.fromkeys(f"{r['machine']}, {r['threads']} threads" for r in timed if r["threads"])
    dates = sorted({r["date"] for r in rows})
    days = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    commits = ", ".join(dict.fromkeys(r["commit"] for r in rows))
    measured = f"Measured on {'; '.join(said)}. " if said else "Nothing was timed yet. "
    parts.append(f"{measured}{days}, commit {commits}. Brackets are the 20 % and 80 % quantiles; "
                 "every number is a row of `benchmarks/results/measurements.csv`.")  # fmt: skip
    return "\n\n".join(parts)


def roofs(rows: list[Row]) -> list[str]:
    """Lines of Markdown: the modelled time of each counted model by one roof and by three, and which of them binds."""
    lines = ["| model | pure roof, µs/image | three roofs, µs/image | of these bound by bytes | FLOPs | issue slots "
             "| timm eager, three roofs |", "|---" * 7 + "|"]
    columns = ("modelled_us_h100", "honest_us_h100", *(f"h100_us_bound_by_{r}" for r in ("bytes", "flops", "issue")))
    eager = {row["model"]: row["honest_us_h100"] for row in rows if row["side"] == "eager"}
    for row in rows:
        if row["side"] == "ours" and row["model"] != "normalised_target":
            lines.append(f"| {' | '.join((row['model'], *(row[c] for c in columns), eager[row['model']]))} |")
    return lines


def between(readme: str, name: str, text: str) -> str:
    """The README with the text between its markers of ``name`` replaced.

    Raises:
        ValueError: A marker is missing.
    """
    begin, end = f"<!-- {name}: begin (benchmarks/readme_table.py) -->", f"<!-- {name}: end -->"
    before, found, rest = readme.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"README.md: the markers {begin} and {end} are missing")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def with_tables(readme: str) -> str:
    """The README with what the committed CSV files give."""
    readme = between(readme, "measured", text(harness.read_rows(CSV)))
    return between(readme, "modelled", "\n".join(roofs(command.read_csv(ROOFS))))


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("readme_table.py", __doc__)
    parser.add_argument("--check", action="store_true", help="only say whether README.md is up to date")
    args = parser.parse_args(argv)
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = with_tables(old)
    if args.check:
        print("README.md is up to date" if new == old else "README.md is not what the CSV gives; run without --check")
        return int(new != old)
    command.write_whole(path, new)
    return 0


if __name__ == "__main__":
    command.exit_with("readme_table.py", main)
