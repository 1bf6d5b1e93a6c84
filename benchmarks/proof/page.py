"""The report page and the CSV of a proof, drawn from the result files."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import bars, command, harness
from benchmarks.proof.part import Part
from benchmarks.proof.store import Result

REPORT, CSV = "report.html", "measurements.csv"
STYLE = bars.PAGE_STYLE + """
th, td { text-align: left; vertical-align: top }
.passed { color: var(--own) } .failed { color: var(--simmim); font-weight: bold }
"""
MEASURED = ("case", "dtype", "batch", "provider", "seconds", "images_per_sec", "ratio", "roofline_share",
            "matmul_share", "peak_memory_gib", "note")  # fmt: skip


def write(folder: Path, parts: Sequence[Part], results: dict[str, Result], key: str) -> None:
    """Replace the report and the CSV; rows are those of all parts that ran under ``key``."""
    rows = [row for result in results.values() if result.key == key for row in result.rows]
    command.write_csv(folder / CSV, harness.COLUMNS, rows)
    command.write_whole(folder / REPORT, "\n".join(_page(parts, results, key)) + "\n")


def _page(parts: Sequence[Part], results: dict[str, Result], key: str) -> Iterator[str]:
    yield '<!doctype html><html lang="en"><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1"><title>GPU proof</title>'
    yield f"<style>{STYLE}</style><body>"
    yield "<h1>GPU proof</h1>"
    yield _table(("part", "what", "result", "seconds", "where and when"), [
        [part.name, part.title, *_status(results.get(part.name), key)] for part in parts
    ])  # fmt: skip
    for part in parts:
        if (result := results.get(part.name)) is not None:
            yield from _section(part, result)
    yield "</body></html>"


def _status(result: Result | None, key: str) -> list[str]:
    if result is None:
        return ["not run", "", ""]
    stale = "" if result.key == key else " (of other sources, libraries or machine)"
    state = "passed" if result.passed else f"failed: {result.reason}"
    return [state + stale, f"{result.seconds:.0f}", _where(result.where)]


def _where(where: dict[str, Any]) -> str:
    names = ("python", "torch", "triton", "timm")
    versions = [f"{name} {where[name]}" for name in names if where.get(name)]
    commit = f"commit {where.get('commit', 'unknown')}"
    return ", ".join([str(where.get("machine", "")), *versions, commit, str(where.get("date", ""))])


def _section(part: Part, result: Result) -> Iterator[str]:
    yield f"<h2 id={html.escape(part.name)}>{html.escape(part.title)}</h2>"
    if result.reason:
        yield f'<p class="failed">{html.escape(result.reason)}</p>'
    if result.facts:
        yield _table(("looked at", "found", "expected", ""), [
            [fact["name"], fact["value"], fact["expected"], "holds" if fact["holds"] else "WRONG"]
            for fact in result.facts
        ])  # fmt: skip
    if result.rows:
        yield from _picture(result.rows, part.title)
        columns = [c for c in MEASURED if any(row.get(c) for row in result.rows)]
        yield _table(columns, [[str(row.get(c, "")) for c in columns] for row in result.rows])
    if result.left_out:
        yield "<p>Left out:</p><ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in result.left_out) + "</ul>"


def _picture(rows: list[dict[str, Any]], title: str) -> Iterator[str]:
    full = [dict.fromkeys(harness.COLUMNS, "") | {name: str(value) for name, value in row.items()} for row in rows]
    if full[0]["images_per_sec"]:
        text, picture = "Images a second: longer is faster", bars.grouped(full, "images_per_sec", "images/s")
    elif full[0]["matmul_share"]:
        text, picture = "Shares of what a copy and a product reach in this run: at the line is all", bars.shares(full)
    else:
        text, picture = bars.speedups_show(full), bars.speedups(full)
    if picture:
        yield bars.figure(f"{title}. {text}", picture)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def cell(text: str) -> str:
        kind = "passed" if text in ("passed", "holds") else "failed" if text.startswith(("failed", "WRONG")) else ""
        return f"<td{f' class={kind}' if kind else ''}>{html.escape(text)}</td>"

    rows = ["".join(map(cell, line)) for line in lines]
    titles = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f'<div class="scroll"><table><tr>{titles}</tr>\n<tr>' + "</tr>\n<tr>".join(rows) + "</tr></table></div>"
