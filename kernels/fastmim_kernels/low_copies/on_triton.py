"""Copies of many tensors in one launch: a program looks up in a table which piece of which tensor is its own.

The table holds addresses. Parameters keep theirs from step to step, so that it is made and sent to the device
once; a step only compares the addresses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot_case import AotCase
from ..common.device import on_own_device
from .op import padded

PIECE = 16384
"""Values of a program."""

_tables: dict[tuple[int, ...], Tensor] = {}


@triton.jit
def copy_kernel(
    p_table,  # (pieces, 3) int64: address of float32 values, where they go, how many
    p_out,  # flat, out
    PIECE: tl.constexpr, BLOCK: tl.constexpr,
):
    p_row = p_table + tl.program_id(0).to(tl.int64) * 3
    p_in = tl.multiple_of(tl.load(p_row).to(tl.pointer_type(tl.float32)), 16)
    p_own = tl.multiple_of(p_out + tl.multiple_of(tl.load(p_row + 1), 16), 16)
    count = tl.load(p_row + 2)
    # Whole vectors, and then the end of a tensor whose size is no multiple of one.
    whole = count // 8 * 8
    for i in range(0, PIECE, BLOCK):
        o = i + tl.arange(0, BLOCK)
        b_x = tl.load(p_in + o, mask=o < whole, other=0)
        tl.store(p_own + o, b_x.to(p_out.dtype.element_ty), mask=o < whole)
    o = whole + tl.arange(0, 8)
    tl.store(p_own + o, tl.load(p_in + o, mask=o < count, other=0).to(p_out.dtype.element_ty), mask=o < count)


@on_own_device
def copy(tensors: Sequence[Tensor], flat: Tensor) -> None:
    """Write each contiguous float32 tensor into ``flat``, one after the other, padded."""
    rows = table(tensors)
    copy_kernel[(len(rows),)](rows, flat, PIECE=PIECE, BLOCK=2048, num_warps=8)


def table(tensors: Sequence[Tensor]) -> Tensor:
    """(pieces, 3) int64 on the device of ``tensors``, of which the last one of each model is kept."""
    key = tuple(value for t in tensors for value in (t.data_ptr(), t.numel()))
    if key not in _tables:
        rows, end = [], 0
        for t in tensors:
            if t.data_ptr() % 16:
                raise ValueError("low_copies: a parameter must start at a multiple of 16 bytes; use impl='torch'")
            rows += [(t.data_ptr() + 4 * i, end + i, min(PIECE, t.numel() - i)) for i in range(0, t.numel(), PIECE)]
            end += padded(t.numel())
        while len(_tables) >= 8:
            _tables.pop(next(iter(_tables)))
        _tables[key] = torch.tensor(rows, dtype=torch.int64).to(tensors[0].device)
    return _tables[key]


def aot_cases() -> list[AotCase]:
    """float32 parameters to bf16."""
    return [AotCase("low_copies", copy_kernel, {"p_table": "*i64", "p_out": "*bf16"}, {"PIECE": PIECE, "BLOCK": 2048},
                    num_warps=8, divisible=("p_table", "p_out"), quick=True, others=("fp16",))]
