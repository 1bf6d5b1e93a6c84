"""Settings that every test shares: few threads, and tests that are skipped where everybody sees it.

GPU machines are often bare: the tests marked cuda need torch, triton, timm and what these bring, and nothing else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator

import pytest
import torch

# Two processes run the tests; tiny tensors gain nothing from threads anyway. Fixed, so that sums are added in the same
# order on every machine.
torch.set_num_threads(1)
# Subprocesses start with the same, whatever the caller's shell says.
os.environ["OMP_NUM_THREADS"] = "1"
# What is measured on a GPU at first use may be another way in another run.
os.environ["FASTMIM_TUNE"] = "0"

_NO_GPU = "no CUDA GPU on this machine"
_MAY_LACK = re.compile(r"^E +ModuleNotFoundError: (No module named '(?:pydantic|deepspeed|nvidia|hypothesis)\b.*')$",
                       re.MULTILINE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason=_NO_GPU))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport,
                                                                        pytest.CollectReport]:
    """A module of tests whose import lacks a package that a bare machine lacks is skipped, and says so."""
    report = yield
    lacking = _MAY_LACK.search(str(report.longrepr)) if report.failed and isinstance(collector, pytest.Module) else None
    if lacking:
        report.outcome = "skipped"
        report.longrepr = str(collector.path), 1, f"Skipped: {lacking[1]}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if _NO_GPU in str(r.longrepr)]
    if skipped:
        terminalreporter.section("GPU tests", sep="!", yellow=True, bold=True)
        terminalreporter.line(f"{len(skipped)} CUDA tests were NOT run: {_NO_GPU}.")
