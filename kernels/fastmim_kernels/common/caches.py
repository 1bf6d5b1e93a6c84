"""What the ops remember between calls."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

R = TypeVar("R")
MOST = 64


def keep_tensors(make: Callable[..., R]) -> Callable[..., R]:
    """``make`` with its last results kept, for a function of hashable arguments by position that makes tensors.

    While a CUDA graph is captured, what is not there is made for the graph alone: memory of its pool has values only
    behind a replay.
    """
    kept: dict[tuple[Hashable, ...], R] = {}

    @functools.wraps(make)
    def find(*args: Any) -> R:
        if args in kept:
            return kept[args]
        found = make(*args)
        if not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
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
