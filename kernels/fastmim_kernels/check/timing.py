"""GPU time of calls that are short against what the host takes to launch them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

WARM_UP, CALLS, ROUNDS = 10, 20, 5
DOUBLINGS = 8
"""Of the work before the calls, which the first round has a good guess of."""
FILL_BYTES = 256 << 20
"""Beyond any L2: one fill takes a GPU some ten times as long as the host needs to ask for it."""


def gpu_microseconds(run: Callable[[], object], calls: int = CALLS) -> float:
    """Median over some rounds of the GPU's time for one of ``calls`` calls, on the current device and stream.

    The calls are put into the stream behind work that keeps the GPU busy until the last of them is there: between the
    two events it then never waits for the host, and its clocks are up. A round in which that work ended too early is
    repeated behind twice as much.

    Calls that themselves wait for the GPU, or are more than its queue takes, cannot be asked for in time: they are
    timed with those waits, which are a part of what they cost.
    """
    for _ in range(WARM_UP):
        run()
    torch.cuda.synchronize()
    filler = torch.empty(FILL_BYTES, dtype=torch.uint8, device="cuda")
    began = time.perf_counter()
    for _ in range(calls):
        run()
    host = time.perf_counter() - began
    fills = max(1, round(host / _fill_seconds(filler)))
    times: list[float] = []
    most = fills << DOUBLINGS
    while len(times) < ROUNDS:
        microseconds, in_time = _round(run, calls, filler, fills)
        if in_time or fills >= most:
            times.append(microseconds / calls)
        else:
            fills *= 2
    return statistics.median(times)


def _round(run: Callable[[], object], calls: int, filler: torch.Tensor, fills: int) -> tuple[float, bool]:
    """(µs of all calls, whether the GPU still had the work before them when the host was done)."""
    filled, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    for _ in range(fills):
        filler.zero_()
    filled.record()
    for _ in range(calls):
        run()
    end.record()
    in_time = not filled.query()
    torch.cuda.synchronize()
    return 1e3 * filled.elapsed_time(end), in_time


def _fill_seconds(filler: torch.Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    filler.zero_()
    start.record()
    for _ in range(WARM_UP):
        filler.zero_()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e-3 / WARM_UP
