"""A plan on a terminal: the same cells and lines as the text, the table by rich."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from .report import TEXT_COLUMNS, Plan, as_text, conclusions, heading, table_rows

if TYPE_CHECKING:
    from rich.table import Table


def show(plan: Plan) -> None:
    """Print a plan to standard output, a terminal: green is recommended, dim does not fit.

    On a terminal that is narrower than the table the text is printed: rich would cut its cells.
    """
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    table, width = _table(plan)
    if width > console.width:
        sys.stdout.write(as_text(plan))
        return
    for line in (*heading(plan), ""):
        console.print(line)
    console.print(table)
    for line in ("", *conclusions(plan)):
        console.print(line)


def _table(plan: Plan) -> tuple[Table, int]:
    """The table, and the characters it is wide."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    header, *rows = table_rows(plan)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i in TEXT_COLUMNS else "right", no_wrap=True)
    for option, row in zip(plan.options, rows, strict=True):
        table.add_row(*row, style="bold green" if option is plan.recommended else "" if option.fits else "dim")
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    # One column of padding and one of the box between two cells.
    return table, sum(widths) + 2 * len(widths)
