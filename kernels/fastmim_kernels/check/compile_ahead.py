"""Compilation of many kernels at once, before a step waits for one after the other.

Triton compiles in threads: its passes and LLVM run without Python's lock, ``ptxas`` in a process of its own; the lock
is held to read a kernel's source, a tenth of the time. What is compiled lies in Triton's cache on disk, whose files
appear whole or not at all: for this process's first launch, and for every other process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from concurrent.futures import TimeoutError as OutOfTime
from typing import Any

import torch

from .launches import Launch, Pointer

Progress = Callable[[int, int], None]
"""(kernels that are done, kernels): called after each."""

TIMEOUT = 600.0
"""Seconds for all kernels; what takes longer is left to the launch that needs it."""


def compile_ahead(launches: Iterable[Launch], progress: Progress = lambda done, of: None,
                  workers: int | None = None, timeout: float = TIMEOUT) -> list[str]:
    """Compile what ``launches`` need on the current CUDA device, each kernel once for each specialisation.

    Args:
        launches: Of :func:`.launches.launches_of`.
        progress: Told how far it is.
        workers: Threads; default: one for each processor that this process may use.
        timeout: Seconds until it gives up waiting.

    Returns:
        For each kernel that failed, its name and why, in one line. Nothing is raised: the launch itself will fail
        in the same way, and be told from others by then.
    """
    distinct = list({specialisation(launch): launch for launch in launches}.values())
    ends = time.monotonic() + timeout
    failed = _compiled(distinct, workers or len(os.sched_getaffinity(0)), ends, progress)
    # Once more, alone: a thread may fail for others that read source meanwhile, since CPython 3.11 counts the depth of
    # ``ast.parse`` for all of them together (gh-106905); and many compilers share the memory.
    late = [(launch, why) for launch, why in failed if isinstance(why, OutOfTime)]
    failed = late + _compiled([launch for launch, why in failed if not isinstance(why, OutOfTime)], 1, ends)
    return [f"{launch.name}: {_line(why, timeout)}" for launch, why in failed]


def _compiled(launches: list[Launch], workers: int, ends: float,
              progress: Progress = lambda done, of: None) -> list[tuple[Launch, BaseException]]:
    """Compile ``launches`` in threads until ``time.monotonic()`` is ``ends``: which are not done, and why."""
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    pool = ThreadPoolExecutor(workers, "triton", _enter, (device,))
    futures = [pool.submit(_compile, launch) for launch in launches]
    try:
        for done, _ in enumerate(as_completed(futures, max(0.0, ends - time.monotonic())), 1):
            progress(done, len(futures))
    except OutOfTime:
        pass
    finished = [(launch, future.exception() if future.done() else OutOfTime())
                for launch, future in zip(launches, futures, strict=True)]
    # Without waiting: a compiler that hangs would take the run with it.
    pool.shutdown(wait=False, cancel_futures=True)
    return [(launch, why) for launch, why in finished if why is not None]


def _line(why: BaseException, timeout: float) -> str:
    if isinstance(why, OutOfTime):
        return f"not compiled after {timeout:.0f} s"
    return f"{type(why).__name__}: {' '.join(str(why).split())[:300]}"


def _enter(device: int | None) -> None:
    # The current device is a thread's own.
    if device is not None:
        torch.cuda.set_device(device)


def _compile(launch: Launch) -> None:
    launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.settings)


def specialisation(launch: Launch) -> Hashable:
    """Equal for launches that run one compiled kernel: what Triton's JIT looks at in each argument."""
    kinds = [_kind(arg, parameter) for arg, parameter in zip(launch.args, launch.kernel.params, strict=False)]
    return launch.kernel, tuple(kinds), tuple(sorted((name, str(value)) for name, value in launch.settings.items()))


def _kind(arg: Any, parameter: Any) -> Hashable:
    if isinstance(arg, Pointer):
        return str(arg.dtype), arg.data_ptr() % 16 == 0
    if isinstance(arg, int) and not isinstance(arg, bool) and not parameter.is_constexpr:
        size = "i32" if -(2**31) <= arg < 2**31 else "i64"
        return size if parameter.do_not_specialize else (size, arg == 1, arg % 16 == 0)
    return type(arg).__name__ if isinstance(arg, float) and not parameter.is_constexpr else str(arg)
