"""Sizes of launches, worked out on the host: plain arithmetic, since Triton's own functions of these names cost a
launch's time when they are called outside a kernel."""

from __future__ import annotations


def cdiv(count: int, size: int) -> int:
    """⌈count / size⌉."""
    return -(-count // size)


def next_power_of_2(n: int) -> int:
    """Smallest power of two ≥ ``n``, which is 1 at least."""
    return 1 << (n - 1).bit_length()
