"""The kernels of the parts behind this one, all compiled at once: one after the other they would take the budget."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import bench_kernels, kernel_works
from benchmarks.proof.ops import shapes
from benchmarks.proof.part import Outcome, Setting, one_line
from fastmim_kernels.check import self_test
from fastmim_kernels.check.compile_ahead import compile_ahead, specialisation
from fastmim_kernels.check.launches import Launch, launches_of

TIMEOUT = 240.0
"""Seconds; what is not compiled by then waits for its launch."""


def compiled(setting: Setting, outcome: Outcome) -> None:
    """Compile what the self-test and the comparison with float64 launch, found on fake tensors."""
    launches = [launch for found in _traced(setting, outcome) for launch in found]
    count = len({specialisation(launch) for launch in launches})
    outcome.check("distinct kernels", count, "some", count > 0)
    if setting.dry:
        outcome.leave_out("their compilation, and the kernels of bf16 and fp16: there is no GPU")
        return
    began = time.monotonic()
    failed = compile_ahead(launches, _told, timeout=TIMEOUT)
    outcome.note("seconds of compilation", time.monotonic() - began)
    for line in failed:
        name, _, reason = line.partition(": ")
        outcome.check(name, reason, "compiles", "not compiled after" in reason)


def _traced(setting: Setting, outcome: Outcome) -> Iterator[list[Launch]]:
    dtypes = {"fp32": torch.float32} if setting.dry else bench_kernels.DTYPES
    for name, dtype in dtypes.items():
        yield launches_of(functools.partial(self_test.request, [dtype]))
        for op, where, shape, batch in [] if setting.dry else shapes():
            try:
                yield launches_of(functools.partial(_run, op, shape, batch, dtype))
            except Exception as broken:
                outcome.leave_out(f"{op}, {where}, {name}: compiled when it is launched ({one_line(broken)})")


def _run(op: str, shape: dict[str, Any], batch: int, dtype: torch.dtype) -> None:
    work = kernel_works.WORKS[op](shape, batch, dtype.itemsize)
    low = dict.fromkeys(work.low, dtype)
    bench_kernels.results(bench_kernels.provider(op, "triton"), work, low, torch.device("cpu"))


def _told(done: int, of: int) -> None:
    if done % 50 == 0 or done == of:
        print(f"{done} of {of} kernels are compiled", flush=True)
