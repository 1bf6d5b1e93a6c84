"""compute-sanitizer's memory checker over one training step."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks import harness
from benchmarks.proof.part import Outcome, Setting

TOOL = "compute-sanitizer"
# Calls that libraries make to see whether they fail are no errors of ours.
OPTIONS = ("--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9")
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")


def sanitizer(setting: Setting, outcome: Outcome) -> None:
    """A small step of Swin and SwinV2 in two precisions."""
    tool = shutil.which(TOOL, path=os.pathsep.join([os.environ.get("PATH", ""), *PLACES]))
    watched = [tool, *OPTIONS] if tool and not setting.dry else []
    if not watched:
        why = "dry" if setting.dry else f"there is no {TOOL} on PATH or in {PLACES[0]}"
        outcome.leave_out(f"memcheck: {why}; the step ran without it")
    status, text = small_step(watched, setting.device)
    outcome.check("the small step", f"exit status {status}", "0", status == 0)
    if watched:
        errors = summary(text)
        outcome.check("errors that memcheck found", "no summary" if errors is None else errors, "0", errors == 0)


def small_step(watched: list[str], device: str) -> tuple[int, str]:
    """Exit status and output of :mod:`benchmarks.proof.small_step` under a tool."""
    command = [*watched, sys.executable, "-m", "benchmarks.proof.small_step", device]
    paths = os.pathsep.join([str(harness.ROOT), str(harness.ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    # Without torch's cache every tensor is an allocation of its own, with bounds that the tool knows.
    environment = os.environ | {"PYTHONPATH": paths, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, cwd=Path(harness.ROOT), text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, check=False)  # fmt: skip
    print(done.stdout, flush=True)
    return done.returncode, done.stdout


def summary(text: str) -> int | None:
    """The number of errors that compute-sanitizer states at its end; None where it has not come that far."""
    found = re.search(r"ERROR SUMMARY: (\d+) errors?", text)
    return int(found[1]) if found else None
