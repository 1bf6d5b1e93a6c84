"""Settings that every test shares: few threads, and GPU tests that are skipped where everybody sees it."""

from __future__ import annotations

import os

import pytest
import torch

# Fixed, so that sums are added in the same order on every machine that runs the tests.
torch.set_num_threads(2)
# Subprocesses start with the same, whatever the caller's shell says.
os.environ["OMP_NUM_THREADS"] = "2"

_NO_GPU = "no CUDA GPU on this machine"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason=_NO_GPU))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if _NO_GPU in str(r.longrepr)]
    if skipped:
        terminalreporter.section("GPU tests", sep="!", yellow=True, bold=True)
        terminalreporter.line(f"{len(skipped)} CUDA tests were NOT run: {_NO_GPU}.")
