"""Look-up of relative position biases and its deterministic adjoint.

The two small layers of the MLP stay with cuBLAS; what torch does badly is the adjoint of the look-up, atomics
or a sort in every step. Here the pairs are sorted by table row once for each index tensor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .aot import AotCase

# The order belongs to the index, a buffer of the model that never changes.
_segments: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@triton.jit
def look_up_kernel(
    p_table,  # (lines, T) sigmoids
    p_index,  # (pairs,) int64 rows of the table
    p_out,  # (lines, pairs) float32
    lines, rows, pairs, LINES: tl.constexpr, BLOCK: tl.constexpr,
):
    i_line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    i_pair = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_pair = i_pair < pairs
    m = (i_line < lines)[:, None] & m_pair[None, :]
    o_row = tl.load(p_index + i_pair, mask=m_pair, other=0)
    b_x = tl.load(p_table + i_line[:, None] * rows + o_row[None, :], mask=m, other=0)
    tl.store(p_out + i_line[:, None] * pairs + i_pair[None, :], b_x * 16, mask=m)


@triton.jit
def scatter_kernel(
    p_grad,  # (lines, pairs) float32
    p_order,  # (pairs,) int64, pairs sorted by row
    p_start,  # (T + 1,) int64, first pair of each row in that order
    p_table,  # (lines, T) sigmoids
    p_out,  # (lines, T) gradient of the logits
    lines, rows, pairs, LINES: tl.constexpr, BLOCK: tl.constexpr,
):
    i_line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    i_row = tl.program_id(1).to(tl.int64)
    m_line = i_line < lines
    first = tl.load(p_start + i_row)
    last = tl.load(p_start + i_row + 1)
    acc = tl.zeros((LINES, BLOCK), tl.float32)
    for j in range(first, last, BLOCK):
        o_j = j + tl.arange(0, BLOCK)
        m_j = o_j < last
        o_pair = tl.load(p_order + o_j, mask=m_j, other=0)
        acc += tl.load(p_grad + i_line[:, None] * pairs + o_pair[None, :], mask=m_line[:, None] & m_j[None, :], other=0)
    o_out = i_line * rows + i_row
    b_s = tl.load(p_table + o_out, mask=m_line, other=0)
    tl.store(p_out + o_out, tl.sum(acc, 1) * 16 * b_s * (1 - b_s), mask=m_line)


LOOK_UP = {"LINES": 8, "BLOCK": 256, "num_warps": 4}
SCATTER = {"LINES": 32, "BLOCK": 16, "num_warps": 4}


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """(L, heads, T) → (L, heads, N, N) float32, times 16."""
    blocks, heads, rows = table.shape
    lines, pairs = blocks * heads, index.numel()
    out = torch.empty((blocks, heads, *index.shape), dtype=torch.float32, device=table.device)
    look_up_kernel[(triton.cdiv(lines, LOOK_UP["LINES"]), triton.cdiv(pairs, LOOK_UP["BLOCK"]))](
        table, index.contiguous(), out, lines, rows, pairs, **LOOK_UP)
    return out


def scatter(grad: Tensor, index: Tensor, table: Tensor) -> Tensor:
    """Gradient (L, heads, T) of the logits from that of the bias, which is contiguous."""
    blocks, heads, rows = table.shape
    order, start = _sorted(index, rows)
    out = torch.empty(table.shape, dtype=torch.float32, device=table.device)
    scatter_kernel[(triton.cdiv(blocks * heads, SCATTER["LINES"]), rows)](
        grad, order, start, table, out, blocks * heads, rows, index.numel(), **SCATTER)
    return out


def _sorted(index: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    if index not in _segments or _segments[index][0] != index._version:
        flat = index.reshape(-1)
        values, order = torch.sort(flat, stable=True)
        start = torch.searchsorted(values, torch.arange(rows + 1, device=flat.device))
        _segments[index] = index._version, order, start
    return _segments[index][1:]


def aot_cases() -> list[AotCase]:
    """All blocks of a stage of SwinV2, window 12. Both kernels look single values up, so few accesses are wide."""
    types = {"p_index": "*i64", "p_order": "*i64", "p_start": "*i64"}
    cases = []
    for name, kernel, tiles in (("look_up", look_up_kernel, LOOK_UP), ("scatter", scatter_kernel, SCATTER)):
        constexprs = {k: v for k, v in tiles.items() if k.isupper()}
        signature = {n: types.get(n, "*fp32") if n.startswith("p_") else "i32" for n in kernel.arg_names
                     if n not in constexprs}
        divisible = tuple(n for n in signature if n not in ("rows", "lines"))
        cases.append(AotCase(name, kernel, signature, constexprs, tiles["num_warps"], 2, divisible, quick=True,
                             wide_target=0.4 if name == "look_up" else 0.0))
    return cases
