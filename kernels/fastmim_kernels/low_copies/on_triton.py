"""Copies of many tensors in one launch: a program looks up in a table which piece of which tensor is its own.

The table holds addresses. Parameters keep theirs from step to step, so that it is made and sent to the device
once; a step only compares the addresses. A table says nothing but its key, so none is ever wrong; it is kept for the
stream in which it was sent. A CUDA graph keeps the address of its table, which then stays for good.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot_case import AotCase
from .layout import padded, total

PIECE = 16384
"""Values of a program."""

_tables: dict[tuple[int, ...], Tensor] = {}
_of_graphs: dict[tuple[int, ...], Tensor] = {}
"""Tables whose addresses CUDA graphs hold."""


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


def forward(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Launch the kernel; arguments and result as the op ``fastmim::low_copies``."""
    flat = tensors[0].new_empty(total(tensors), dtype=dtype)
    copy(tensors, flat)
    return flat


def copy(tensors: Sequence[Tensor], flat: Tensor) -> None:
    """Write each contiguous float32 tensor into ``flat``, one after the other, padded."""
    rows = table(tensors)
    copy_kernel.run(rows, flat, PIECE=PIECE, BLOCK=2048, num_warps=8, grid=(len(rows),), warmup=False)


def table(tensors: Sequence[Tensor]) -> Tensor:
    """(pieces, 3) int64 on the device of ``tensors``, which is current; those of the last models are kept.

    Raises:
        ValueError: A tensor starts where no vector does.
        RuntimeError: A CUDA graph is captured, and these tensors were not copied before.
    """
    device = tensors[0].device
    cuda = device.type == "cuda"
    stream = torch.cuda.current_stream(device).cuda_stream if cuda else 0
    key = stream, *[t.data_ptr() for t in tensors], *[t.numel() for t in tensors]
    if cuda and torch.cuda.is_current_stream_capturing():
        return _for_graph(key[1:])
    found = _tables.get(key)
    if found is None:
        while len(_tables) >= 8:
            _tables.pop(next(iter(_tables)))
        found = _tables[key] = _rows(tensors).to(device)
    return found


def _for_graph(addresses: tuple[int, ...]) -> Tensor:
    """The table of these addresses that some stream has: sending one waits for the host, which a capture forbids."""
    if addresses not in _of_graphs:
        found = next((rows for key, rows in _tables.items() if key[1:] == addresses), None)
        if found is None:
            raise RuntimeError("low_copies: its table cannot be made while a CUDA graph is captured; run the step once "
                               "before, with the same parameters")
        _of_graphs[addresses] = found
    return _of_graphs[addresses]


def _rows(tensors: Sequence[Tensor]) -> Tensor:
    rows, end = [], 0
    for t in tensors:
        if t.data_ptr() % 16:
            raise ValueError("low_copies: a parameter must start at a multiple of 16 bytes; use impl='torch'")
        rows += [(t.data_ptr() + 4 * i, end + i, min(PIECE, t.numel() - i)) for i in range(0, t.numel(), PIECE)]
        end += padded(t.numel())
    return torch.tensor(rows, dtype=torch.int64)


def aot_cases() -> list[AotCase]:
    """float32 parameters to bf16."""
    return [AotCase("low_copies", copy_kernel, {"p_table": "*i64", "p_out": "*bf16"}, {"PIECE": PIECE, "BLOCK": 2048},
                    num_warps=8, divisible=("p_table", "p_out"), quick=True, others=("fp16",),
                    trips=lambda a: (a["PIECE"] / a["BLOCK"],))]
