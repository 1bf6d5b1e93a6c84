"""Where the blocks of an encoder lie in the flat tensors of ``position_bias``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

ALIGN = 16
"""Values: a bias starts at a multiple of it, so that kernels read 128 bits at a time."""


class Block(NamedTuple):
    """Where a block's parts lie: sizes, then offsets into flat tensors."""

    heads: int
    rows: int
    """T of the bias table."""
    pairs: int
    """N² of the bias."""
    params: int
    coords: int
    pair: int
    start: int
    table: int
    bias: int


class BiasPlan(NamedTuple):
    """What :func:`position_bias` knows of the blocks; the tensors are buffers of the model."""

    rows: Tensor
    """(Σ N²,) int64: table row of each query/key pair, stage after stage."""
    order: Tensor
    """(Σ N²,) int64: the pairs of a stage sorted by table row."""
    start: Tensor
    """(Σ (T + 1),) int64: first pair of each row in that order."""
    coords: Tensor
    """(Σ T, 2) float32: log-spaced relative coordinates; empty for tables."""
    layout: Tensor
    """(blocks, 9) int64: :class:`Block` of each, for the kernels."""


def unflatten(layout: Sequence[int]) -> tuple[Block, ...]:
    """The blocks of an op's ``layout``."""
    return _blocks(tuple(layout))


@lru_cache(maxsize=64)
def _blocks(layout: tuple[int, ...]) -> tuple[Block, ...]:
    size = len(Block._fields)
    return tuple(Block(*layout[i : i + size]) for i in range(0, len(layout), size))


def sizes(blocks: Sequence[Block], hidden: int) -> tuple[int, int]:
    """Values of all biases, and of all tables that an MLP gives (0 without one)."""
    last = blocks[-1]
    biases = last.bias + math.ceil(last.heads * last.pairs / ALIGN) * ALIGN
    return biases, last.table + last.heads * last.rows if hidden else 0


def part(flat: Tensor, start: int, rows: int, columns: int) -> Tensor:
    return flat[start : start + rows * columns].view(rows, columns)
