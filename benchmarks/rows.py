"""Rows of the CSV as tables and pictures read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
KEY = ("benchmark", "case", "dtype", "batch", "img_size", "ranks", "device", "machine", "provider")
NOTED = ("step", "profile", "pretrain")  # whose note says what was measured, not what came out


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
    """Case, precision and batch of a row."""
    ranks = f", {row['ranks']} ranks" if row["ranks"] not in ("", "1") else ""
    batch = f", batch {row['batch']}" if row["batch"] else ""
    return " ".join(filter(None, (row["case"], row["dtype"]))) + batch + ranks


def names(rows: Sequence[Row], column: Callable[[Row], str]) -> list[str]:
    """What the rows have there, each once, in their order."""
    return list(dict.fromkeys(column(row) for row in rows))


def at_usual_size(rows: Sequence[Row]) -> list[Row]:
    """One batch, image size and number of ranks for each case and precision: the first that was measured."""
    first: dict[tuple[str, str], tuple[str, ...]] = {}
    for row in rows:
        first.setdefault((row["case"], row["dtype"]), tuple(row[k] for k in ("batch", "img_size", "ranks")))
    return [r for r in rows if first[r["case"], r["dtype"]] == tuple(r[k] for k in ("batch", "img_size", "ranks"))]
