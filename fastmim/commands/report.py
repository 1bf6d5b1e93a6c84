"""``fastmim report``: a page of one run, or of several side by side."""

from __future__ import annotations

import argparse
from typing import Any

from .console import shown_on_a_terminal, write


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``report`` to the command line."""
    report = commands.add_parser("report", parents=[common], help="an HTML page of runs, side by side")
    report.add_argument("runs", metavar="RUN", nargs="+", help="output folders of runs, finished or not")
    report.add_argument("--out", metavar="FILE", default="report.html", help="the page (default report.html)")
    report.set_defaults(command=make_report)


def make_report(options: argparse.Namespace) -> int:
    """Write the page."""
    with shown_on_a_terminal("loading libraries …"):
        from fastmim.report import write_report

    write(f"{write_report(options.runs, options.out)}\n")
    return 0
