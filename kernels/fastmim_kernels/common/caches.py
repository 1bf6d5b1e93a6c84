"""What the ops remember between calls."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

R = TypeVar("R")
MOST = 64
_here = threading.local()


@contextmanager
def in_memory_of_others() -> Iterator[None]:
    """Around an op that torch itself calls: its compiler may do so in the memory pool of graphs that it captures
    later, in which nothing may stay that is not a result."""
    before, _here.of_others = of_others(), True
    try:
        yield
    finally:
        _here.of_others = before


def of_others() -> bool:
    """Whether this thread is :func:`in_memory_of_others`."""
    return getattr(_here, "of_others", False)


def keep_tensors(make: Callable[..., R]) -> Callable[..., R]:
    """``make`` with its last results kept, for a function of hashable arguments by position that makes tensors.

    While a CUDA graph is captured, what is not there is made for the graph alone: memory of its pool has values only
    behind a replay. What is there stays for good: the graph reads it at its address.
    """
    kept: dict[tuple[Hashable, ...], R] = {}
    of_graphs: dict[int, R] = {}

    @functools.wraps(make)
    def find(*args: Any) -> R:
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        if args in kept:
            if capturing:
                of_graphs[id(kept[args])] = kept[args]
            return kept[args]
        found = make(*args)
        if not capturing:
            while len(kept) >= MOST:
                kept.pop(next(iter(kept)))
            kept[args] = found
        return found

    find.cache_clear = kept.clear  # type: ignore[attr-defined]
    return find


def forget_caches() -> None:
    """What the ops remember between calls, such as a shift mask, would be fake after a trace, or real inside one."""
    for name, module in list(sys.modules.items()):
        if name.startswith("fastmim_kernels."):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
