"""Position bias of all blocks of an encoder in one launch for each step of the way, and its deterministic adjoint.

Blocks differ in heads and window; a row of ``layout`` (:class:`.layout.Block`) tells a program where its block lies in
the flat tensors. Programs beyond the size of their block return at once; what grows with the window lies along x, as
the other axes of a grid end at 65,535. What torch does badly is the adjoint of the look-up, atomics or a sort in every
step: here the pairs come sorted by table row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot_case import AotCase
from ..common.sizes import cdiv, next_power_of_2
from .layout import sizes, unflatten


@triton.jit
def table_kernel(
    p_params,  # flat parameters
    p_coords,  # (Σ T, 2) float32
    p_layout,  # (blocks, 9) int64
    p_table,  # flat, out: (heads, T) sigmoids of each block
    K: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr,
):
    p_block = p_layout + tl.program_id(2) * 9
    heads = tl.load(p_block)
    rows = tl.load(p_block + 1)
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    if (tl.program_id(0) * BT < rows) & (tl.program_id(1) * BH < heads):
        p_own = p_params + tl.load(p_block + 3)
        m_t = o_t < rows
        p_row = p_coords + (tl.load(p_block + 4) + o_t) * 2
        b_y = tl.load(p_row, mask=m_t, other=0)
        b_x = tl.load(p_row + 1, mask=m_t, other=0)
        acc = tl.zeros((BH, BT), tl.float32)
        for k in range(0, K, BK):
            b_first, o_k, m_k = _first_layer(p_own, b_y, b_x, k, K, BK)
            m_w = (o_h < heads)[:, None] & m_k[None, :]
            b_w = tl.load(p_own + 3 * K + o_h[:, None] * K + o_k[None, :], mask=m_w, other=0)
            acc = tl.dot(b_w, tl.trans(b_first), acc, input_precision="ieee")
        o_out = tl.load(p_block + 7) + o_h[:, None] * rows + o_t[None, :]
        tl.store(p_table + o_out, tl.sigmoid(acc), mask=(o_h < heads)[:, None] & m_t[None, :])


@triton.jit
def _first_layer(p_own, b_y, b_x, k, K: tl.constexpr, BK: tl.constexpr):
    """(BT, BK) relu(coords·W1ᵀ + b1) for columns k …, those columns, and which exist."""
    o_k = k + tl.arange(0, BK)
    m_k = o_k < K
    b_wy = tl.load(p_own + 2 * o_k, mask=m_k, other=0)
    b_wx = tl.load(p_own + 2 * o_k + 1, mask=m_k, other=0)
    b_b = tl.load(p_own + 2 * K + o_k, mask=m_k, other=0)
    b_first = b_y[:, None] * b_wy[None, :] + b_x[:, None] * b_wx[None, :] + b_b[None, :]
    return tl.maximum(b_first, 0), o_k, m_k


@triton.jit
def look_up_kernel(
    p_table,  # flat: (heads, T) sigmoids, or (T, heads) tables
    p_index,  # (Σ N²,) int64
    p_layout,  # (blocks, 9) int64
    p_out,  # flat, out: (heads, N²)
    MLP: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr,
):
    p_block = p_layout + tl.program_id(2) * 9
    heads = tl.load(p_block)
    rows = tl.load(p_block + 1)
    pairs = tl.load(p_block + 2)
    i_line = tl.program_id(1) * LINES + tl.arange(0, LINES)
    i_pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_pair = i_pair < pairs
    m = (i_line < heads)[:, None] & m_pair[None, :]
    if (tl.program_id(1) * LINES < heads) & (tl.program_id(0) * BLOCK < pairs):
        o_row = tl.load(p_index + tl.load(p_block + 5) + i_pair, mask=m_pair, other=0)
        if MLP:
            p_own = p_table + tl.load(p_block + 7) + i_line[:, None] * rows + o_row[None, :]
            b_x = tl.load(p_own, mask=m, other=0) * 16
        else:
            p_own = p_table + tl.load(p_block + 3) + o_row[None, :] * heads + i_line[:, None]
            b_x = tl.load(p_own, mask=m, other=0)
        # A multiple of 128 bits, and so is a window's N² in all but odd windows.
        p_bias = p_out + tl.multiple_of(tl.load(p_block + 8), 16)
        tl.store(p_bias + i_line[:, None] * pairs + i_pair[None, :], b_x, mask=m)


@triton.jit
def scatter_kernel(
    p_grad,  # flat: (heads, N²)
    p_order,  # (Σ N²,) int64, pairs sorted by row
    p_start,  # (Σ (T + 1),) int64, first pair of each row in that order
    p_table,  # flat: (heads, T) sigmoids, unused for tables
    p_layout,  # (blocks, 9) int64
    p_out,  # flat, out: gradient of the (heads, T) logits, or of the (T, heads) tables
    MLP: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr,
):
    p_block = p_layout + tl.program_id(2) * 9
    heads = tl.load(p_block)
    rows = tl.load(p_block + 1)
    pairs = tl.load(p_block + 2)
    i_row = tl.program_id(0)
    i_line = tl.program_id(1) * LINES + tl.arange(0, LINES)
    m_line = i_line < heads
    if (i_row < rows) & (tl.program_id(1) * LINES < heads):
        p_first = p_start + tl.load(p_block + 6) + i_row
        first = tl.load(p_first)
        last = tl.load(p_first + 1)
        p_own = p_order + tl.load(p_block + 5)
        p_bias = p_grad + tl.load(p_block + 8)
        acc = tl.zeros((LINES, BLOCK), tl.float32)
        for j in range(first, last, BLOCK):
            o_j = j + tl.arange(0, BLOCK)
            m_j = o_j < last
            o_pair = tl.load(p_own + o_j, mask=m_j, other=0)
            m = m_line[:, None] & m_j[None, :]
            acc += tl.load(p_bias + i_line[:, None] * pairs + o_pair[None, :], mask=m, other=0)
        b_sum = tl.sum(acc, 1)
        if MLP:
            o_out = tl.load(p_block + 7) + i_line * rows + i_row
            b_s = tl.load(p_table + o_out, mask=m_line, other=0)
            tl.store(p_out + o_out, b_sum * 16 * b_s * (1 - b_s), mask=m_line)
        else:
            tl.store(p_out + tl.load(p_block + 3) + i_row * heads + i_line, b_sum, mask=m_line)


@triton.jit
def parameters_kernel(
    p_d_logit,  # flat: (heads, T)
    p_params,  # flat parameters
    p_coords,  # (Σ T, 2) float32
    p_layout,  # (blocks, 9) int64
    p_out,  # flat, out: gradient of the parameters
    K: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr,
):
    p_block = p_layout + tl.program_id(0) * 9
    heads = tl.load(p_block)
    rows = tl.load(p_block + 1)
    o_params = tl.load(p_block + 3)
    p_own = p_params + o_params
    p_first = p_coords + tl.load(p_block + 4) * 2
    p_lines = p_d_logit + tl.load(p_block + 7)
    o_h = tl.arange(0, BH)
    m_h = o_h < heads
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    m_k = o_k < K
    m_w = m_h[:, None] & m_k[None, :]
    b_w = tl.load(p_own + 3 * K + o_h[:, None] * K + o_k[None, :], mask=m_w, other=0)
    a_w2 = tl.zeros((BH, BK), tl.float32)
    a_y = tl.zeros((BK,), tl.float32)
    a_x = tl.zeros((BK,), tl.float32)
    a_b = tl.zeros((BK,), tl.float32)
    for t in range(0, rows, BT):
        o_t = t + tl.arange(0, BT)
        m_t = o_t < rows
        b_y = tl.load(p_first + 2 * o_t, mask=m_t, other=0)
        b_x = tl.load(p_first + 2 * o_t + 1, mask=m_t, other=0)
        b_hidden, _, _ = _first_layer(p_own, b_y, b_x, tl.program_id(1) * BK, K, BK)
        b_d = tl.load(p_lines + o_h[:, None] * rows + o_t[None, :], mask=m_h[:, None] & m_t[None, :], other=0)
        a_w2 = tl.dot(b_d, b_hidden, a_w2, input_precision="ieee")
        b_d_hidden = tl.dot(tl.trans(b_d), b_w, input_precision="ieee")
        b_d_hidden = tl.where(b_hidden > 0, b_d_hidden, 0)
        a_y += tl.sum(b_d_hidden * b_y[:, None], 0)
        a_x += tl.sum(b_d_hidden * b_x[:, None], 0)
        a_b += tl.sum(b_d_hidden, 0)
    p_own = p_out + o_params
    tl.store(p_own + 2 * o_k, a_y, mask=m_k)
    tl.store(p_own + 2 * o_k + 1, a_x, mask=m_k)
    tl.store(p_own + 2 * K + o_k, a_b, mask=m_k)
    tl.store(p_own + 3 * K + o_h[:, None] * K + o_k[None, :], a_w2, mask=m_w)


TABLE = {"BT": 32, "BH": 16, "BK": 32, "num_warps": 4}
LOOK_UP = {"LINES": 8, "BLOCK": 256, "num_warps": 4}
SCATTER = {"LINES": 32, "BLOCK": 16, "num_warps": 4}


def parameter_tiles(heads: int) -> dict[str, int]:
    """Tile of ``parameters_kernel``: all heads; with many, fewer rows at a time fit in registers."""
    block_h = max(16, next_power_of_2(heads))
    return {"BT": 32 if block_h <= 32 else 16, "BK": 16, "BH": block_h, "num_warps": 4}


def forward(params: Tensor, index: Tensor, order: Tensor, start: Tensor, coords: Tensor, table: Tensor,
            layout: Sequence[int], hidden: int) -> tuple[Tensor, Tensor]:
    """Launch the kernels; arguments and results as the op ``fastmim::position_bias``."""
    params, index, coords, table = (t.contiguous() for t in (params, index, coords, table))
    blocks = unflatten(layout)
    heads, rows, pairs = (max(block[i] for block in blocks) for i in range(3))
    bias, sigmoids = (torch.empty(size, dtype=torch.float32, device=params.device) for size in sizes(blocks, hidden))
    if hidden:
        grid = cdiv(rows, TABLE["BT"]), cdiv(heads, TABLE["BH"]), len(blocks)
        table_kernel.run(params, coords, table, sigmoids, K=hidden, **TABLE, grid=grid, warmup=False)
    grid = cdiv(pairs, LOOK_UP["BLOCK"]), cdiv(heads, LOOK_UP["LINES"]), len(blocks)
    look_up_kernel.run(sigmoids if hidden else params, index, table, bias, MLP=hidden > 0, **LOOK_UP,
                       grid=grid, warmup=False)
    return bias, sigmoids


def backward(grad: Tensor, sigmoids: Tensor, params: Tensor, index: Tensor, order: Tensor, start: Tensor,
             coords: Tensor, table: Tensor, layout: Sequence[int], hidden: int) -> Tensor:
    """Launch the kernels; arguments and result as the op ``fastmim::position_bias_backward``."""
    grad, sigmoids, params = (t.contiguous() for t in (grad, sigmoids, params))
    order, start, coords, table = (t.contiguous() for t in (order, start, coords, table))
    blocks = unflatten(layout)
    heads, rows = (max(block[i] for block in blocks) for i in range(2))
    found = torch.empty_like(params)
    d_table = torch.empty_like(sigmoids) if hidden else found
    grid = rows, cdiv(heads, SCATTER["LINES"]), len(blocks)
    scatter_kernel.run(grad, order, start, sigmoids, table, d_table, MLP=hidden > 0, **SCATTER,
                       grid=grid, warmup=False)
    if hidden:
        tiles = parameter_tiles(heads)
        grid = len(blocks), cdiv(hidden, tiles["BK"])
        parameters_kernel.run(d_table, params, coords, table, found, K=hidden, **tiles, grid=grid, warmup=False)
    return found


# Rows of the tables and pairs of the windows: means over the blocks. Half a block more: the last one is not full.
_TRIPS: dict[str, Callable[[Mapping[str, Any]], tuple[float, ...]]] = {
    "table_kernel": lambda a: (a["K"] / a["BK"],),
    "scatter_kernel": lambda a: (a["p_order"].numel() / a["p_start"].numel() / a["BLOCK"] + 0.5,),
    "parameters_kernel": lambda a: (a["p_coords"].shape[0] / a["grid"][0] / a["BT"],),
}


def aot_cases() -> list[AotCase]:
    """SwinV2 and Swin. The kernels look single values up or are tiny products in float32: few accesses are wide."""
    types = {"p_index": "*i64", "p_order": "*i64", "p_start": "*i64", "p_layout": "*i64"}
    kernels = [("table", table_kernel, {"K": 512}, TABLE), ("look_up", look_up_kernel, {"MLP": True}, LOOK_UP),
               ("look_up/table", look_up_kernel, {"MLP": False}, LOOK_UP),
               ("scatter", scatter_kernel, {"MLP": True}, SCATTER),
               ("scatter/table", scatter_kernel, {"MLP": False}, SCATTER)]
    # Heads of SwinV2-B, of L, and, most of all, of G.
    kernels += [(f"parameters/h{h}", parameters_kernel, {"K": 512}, parameter_tiles(h)) for h in (32, 64, 128)]
    cases = []
    for name, kernel, given, tiles in kernels:
        constexprs = given | {k: v for k, v in tiles.items() if k.isupper()}
        signature = {n: types.get(n, "*fp32") for n in kernel.arg_names if n not in constexprs}
        cases.append(AotCase(name, kernel, signature, constexprs, tiles["num_warps"], 2, tuple(signature), quick=True,
                             wide_target=0.0, trips=_TRIPS.get(kernel.fn.__name__)))
    return cases
