"""Compilation of many kernels at once, before a step waits for one after the other.

Triton compiles in threads: its passes and LLVM run without Python's lock, ``ptxas`` in a process of its own; the lock
is held to read a kernel's source, a tenth of the time. What is compiled lies in Triton's cache on disk, whose files
appear whole or not at all: for this process's first launch, and for every other process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
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
    distinct = {specialisation(launch): launch for launch in launches}
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    pool = ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)), "triton", _enter, (device,))
    try:
        names = {pool.submit(_compile, launch): launch.name for launch in distinct.values()}
        return _failures(names, progress, timeout)
    finally:
        # Without waiting: a compiler that hangs would take the run with it.
        pool.shutdown(wait=False, cancel_futures=True)


def _failures(names: dict[Future[Any], str], progress: Progress, timeout: float) -> list[str]:
    failed = []
    try:
        for done, future in enumerate(as_completed(names, timeout), 1):
            if broken := future.exception():
                failed.append(f"{names[future]}: {type(broken).__name__}: {' '.join(str(broken).split())[:300]}")
            progress(done, len(names))
    except OutOfTime:
        failed += [f"{name}: not compiled after {timeout:.0f} s" for future, name in names.items() if not future.done()]
    return failed


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
