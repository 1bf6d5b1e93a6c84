"""Parts of a proof that pass, fail, die or hang."""

from __future__ import annotations

import os
import subprocess
import time

from benchmarks.proof.part import Outcome, Part, Setting


def passes(setting: Setting, outcome: Outcome) -> None:
    outcome.at_most("an error", 1e-7, 1e-6)
    outcome.leave_out("nothing else")
    outcome.rows.append({"benchmark": "kernels", "case": "an op", "seconds": "1.000e-03"})


def is_wrong(setting: Setting, outcome: Outcome) -> None:
    outcome.at_most("a small error", 1e-7, 1e-6)
    outcome.at_most("a large error", float("nan"), 1e-6)


def raises(setting: Setting, outcome: Outcome) -> None:
    outcome.check("before it broke", 1, "1", True)
    raise RuntimeError("an illegal\nmemory access")


def looks_at_nothing(setting: Setting, outcome: Outcome) -> None:
    print("nothing")


def dies(setting: Setting, outcome: Outcome) -> None:
    os._exit(3)


def hangs(setting: Setting, outcome: Outcome) -> None:
    """Together with a process of its own, whose number is in the log."""
    print("child", subprocess.Popen(["sleep", "300"]).pid, flush=True)
    time.sleep(300)


def part(function: str, seconds: int = 0) -> Part:
    return Part(function, f"Title of {function}", seconds, f"{__name__}:{function}")
