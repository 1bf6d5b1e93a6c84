"""A part of the proof: what it is given, and what it hands back."""

from __future__ import annotations

import dataclasses
import importlib
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Part:
    """One part, by the function that runs it.

    Args:
        name: On the command line and of its result file.
        title: One line for the report.
        seconds: What it may take on an H200 with nothing compiled; the budget is kept with it.
        run: ``package.module:function``, called with a :class:`Setting` and the :class:`Outcome` that it fills.
        reference: It measures what ``--reference`` names too.
    """

    name: str
    title: str
    seconds: int
    run: str
    reference: bool = False

    def function(self) -> Callable[[Setting, Outcome], None]:
        """Imported only where the part runs: in its own process."""
        module, _, name = self.run.partition(":")
        found: Callable[[Setting, Outcome], None] = getattr(importlib.import_module(module), name)
        return found


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where a part runs.

    Args:
        device: "cuda" or "cpu".
        dry: Without a GPU: tiny shapes and stand-ins for what only a GPU can do.
        reference: A clone of somebody else's kernels, see ``benchmarks/rivals.py``.
    """

    device: str
    dry: bool
    reference: Path | None = None

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)


@dataclasses.dataclass
class Fact:
    """One thing that was looked at: a value beside what was expected of it."""

    name: str
    value: str
    expected: str
    holds: bool


@dataclasses.dataclass
class Outcome:
    """What a part found. It has passed where it looked at something and everything holds."""

    facts: list[Fact] = dataclasses.field(default_factory=list)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """CSV rows of ``harness.COLUMNS`` without machine, versions, commit and date. A dry run has none."""
    left_out: list[str] = dataclasses.field(default_factory=list)
    """What was not run, and why."""

    def check(self, name: str, value: object, expected: str, holds: bool) -> None:
        """Add a fact, and print it for the log."""
        self.facts.append(Fact(name, _shown(value), expected, bool(holds)))
        print(f"{'ok    ' if holds else 'WRONG '} {name}: {_shown(value)} (expected {expected})", flush=True)

    def at_most(self, name: str, value: float, limit: float) -> None:
        """A fact: ``value <= limit``; NaN is never within."""
        self.check(name, value, f"<= {limit:.3g}", value <= limit)

    def judge(self, name: str, errors: Callable[[], tuple[float, float]]) -> None:
        """:meth:`at_most` of the (error, limit) that ``errors`` returns; what it raises is the fact instead."""
        try:
            error, limit = errors()
        except Exception as broken:  # a kernel that does not compile must not hide the others
            traceback.print_exc()
            self.check(name, one_line(broken), "an error within its limit", False)
        else:
            self.at_most(name, error, limit)

    def note(self, name: str, value: object) -> None:
        """A measured value of which nothing is expected."""
        self.check(name, value, "–", True)

    def leave_out(self, what: str) -> None:
        """``what`` names what was not run, and why."""
        self.left_out.append(what)
        print(f"left out: {what}", flush=True)

    def failure(self) -> str:
        """Why the part has not passed; empty where it has."""
        if not self.facts:
            return "nothing was looked at"
        wrong = [f"{f.name}: {f.value}, expected {f.expected}" for f in self.facts if not f.holds]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        return wrong[0] + more if wrong else ""


def one_line(error: BaseException) -> str:
    """Type and message of an exception, cut to what a table can show."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
