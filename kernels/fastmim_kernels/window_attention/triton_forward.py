"""Shifted-window attention, forward, in one kernel that reads and writes the image layout.

A program keeps one head and walks over a group of windows, so that the head's bias stays in registers (windows
up to 8×8) or in L1. Each window's q, k and v are read once (beyond 192 tokens, k and v once for 64 queries):
all tiles of queries attend to one chunk of keys after the other, under an online softmax. Windows of 65 to 144 tokens
keep whole rows of logits in registers instead (``triton_rows_forward``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.device import processors
from ..common.sizes import cdiv
from .layout import pair
from .triton_backward import backward
from .triton_fragments import BLOCKS_PER_SM, WARPS, by_rows, parts
from .triton_rows_forward import rows_forward_kernel
from .triton_tiles import (
    LOG2E,
    Tiling,
    bias_chunks,
    bias_tile,
    biased,
    chunk_offsets,
    common_constexprs,
    full_chunks,
    full_tiles,
    head_scale,
    image_start,
    inverse_norm,
    load_tile,
    next_power,
    store_tile,
    tile_constexprs,
    token_rows,
    token_sides,
    window_groups,
    window_seams,
)

__all__ = ["backward", "forward"]


@triton.jit
def _queries(p_q, i_window, o_i, image, stride, scale, WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr,
             DP: tl.constexpr, COSINE: tl.constexpr, FULL: tl.constexpr):
    """(q, factor of its logits, sides, image rows) and an empty softmax state of one tile of rows."""
    o_row = token_rows(i_window, o_i, image, WH, WW)
    side = token_sides(o_i, image, WH, WW)
    q = load_tile(p_q, o_row, stride, o_i, WH * WW, D, DP, FULL)
    factor = tl.zeros_like(o_i).to(tl.float32) + scale * LOG2E
    if COSINE:
        factor *= inverse_norm(q)
    # Finite, so that padded rows, all of whose logits are −inf, stay free of NaN until their masked store.
    maximum = tl.full(o_i.shape, -1e30, tl.float32)
    return (q, factor, side, o_row), (maximum, tl.zeros_like(maximum), tl.zeros(q.shape, tl.float32))


@triton.jit
def _attend(queries, state, k, v, key_scale, side_j, seams, bias, COSINE: tl.constexpr, SHIFTED: tl.constexpr,
            PRECISION: tl.constexpr):
    """One step of the online softmax: state is (maximum, sum, weighted values)."""
    q, factor, side_i, _ = queries
    maximum, total, acc = state
    # The norms scale the product, so that q and k enter it unrounded.
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor[:, None]
    if COSINE:
        s *= key_scale[None, :]
    s = biased(s, bias, side_i, side_j, seams, SHIFTED)
    new = tl.maximum(maximum, tl.max(s, 1))
    p = tl.exp2(s - new[:, None])
    decay = tl.exp2(maximum - new)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return new, total * decay + tl.sum(p, 1), acc


@triton.jit
def _step(p_q, p_bias, held, i_window, o_j, rows, queries, state, image, stride, WH: tl.constexpr, WW: tl.constexpr,
          D: tl.constexpr, DP: tl.constexpr, COSINE: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
          FULL_I: tl.constexpr, FULL_J: tl.constexpr):
    """Reads one chunk of keys and lets every tile of queries attend to it; ``held`` is their bias, or empty."""
    o_row = token_rows(i_window, o_j, image, WH, WW)
    side = token_sides(o_j, image, WH, WW)
    seams = window_seams(i_window, image, WH, WW)
    k = load_tile(p_q + stride, o_row, 3 * stride, o_j, WH * WW, D, DP, FULL_J)
    v = load_tile(p_q + 2 * stride, o_row, 3 * stride, o_j, WH * WW, D, DP, FULL_J)
    key_scale = inverse_norm(k) if COSINE else side
    new = ()
    for t in tl.static_range(len(rows)):
        bias = held[t] if len(held) > 0 else bias_tile(p_bias, rows[t], o_j, WH * WW, FULL_I[t], FULL_J)
        new = new + (_attend(queries[t], state[t], k, v, key_scale, side, seams, bias, COSINE, SHIFTED, PRECISION),)
    return new


@triton.jit
def _finish(p_out, p_lse, queries, state, o_i, stride, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
            FULL: tl.constexpr):
    maximum, total, acc = state
    total = tl.maximum(total, 1.0)  # it is at least 1 but in padded rows
    store_tile(p_out, acc / total[:, None], queries[3], stride, o_i, N, D, DP, FULL)
    tl.store(p_lse + o_i, maximum + tl.log2(total), mask=o_i < N)


@triton.jit(do_not_specialize=["windows", "groups", "height", "width", "heads", "shift_y", "shift_x"])
def forward_kernel(
    p_qkv,  # (B, H, W, 3, heads, D)
    p_bias,  # (heads, N, N)
    p_scale,  # (heads,) or None
    p_out,  # (B, H, W, heads, D)
    p_lse,  # (B·windows, heads, N) float32, base 2: backward needs it so
    windows, groups, height, width, heads, shift_y, shift_x,
    WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, KEYS: tl.constexpr, LAST: tl.constexpr,
    HOLD: tl.constexpr, STAGES: tl.constexpr, INNER: tl.constexpr,
):
    N: tl.constexpr = WH * WW
    COSINE: tl.constexpr = p_scale is not None
    i_head = tl.program_id(0) % heads
    i_group = tl.program_id(0) // heads
    image = (height, width, shift_y, shift_x)
    stride = heads * D
    scale = head_scale(p_scale, i_head, D)
    p_bias += i_head.to(tl.int64) * (N * N)
    rows = ()
    for t in tl.static_range(TILES):
        rows = rows + ((tl.program_id(1) * TILES + t) * ROWS + tl.arange(0, ROWS),)
    FULL: tl.constexpr = full_tiles(N, ROWS, TILES)
    held = ()
    if HOLD:
        o_keys = chunk_offsets(N, KEYS, LAST)
        held = bias_chunks(p_bias, rows[0], o_keys, N, FULL[0], full_chunks(N, KEYS, LAST))
    for i_window in tl.range(i_group, windows, groups, num_stages=STAGES, disable_licm=True):
        first = image_start(i_window, image, WH, WW)
        p_q = p_qkv + first * (3 * stride) + i_head * D
        p_o = p_out + first * stride + i_head * D
        p_l = p_lse + (i_window * heads + i_head).to(tl.int64) * N
        queries = ()
        state = ()
        for t in tl.static_range(len(rows)):
            query, empty = _queries(p_q, i_window, rows[t], image, 3 * stride, scale, WH, WW, D, DP, COSINE, FULL[t])
            queries = queries + (query,)
            state = state + (empty,)
        if HOLD:
            for c in tl.static_range(N // KEYS):
                state = _step(p_q, p_bias, (held[c],), i_window, c * KEYS + tl.arange(0, KEYS), rows, queries, state,
                              image, stride, WH, WW, D, DP, COSINE, SHIFTED, PRECISION, FULL, True)
        else:
            for j in tl.range(0, N // KEYS * KEYS, KEYS, num_stages=INNER, disable_licm=True):
                state = _step(p_q, p_bias, (), i_window, j + tl.arange(0, KEYS), rows, queries, state,
                              image, stride, WH, WW, D, DP, COSINE, SHIFTED, PRECISION, FULL, True)
        if LAST > 0:
            state = _step(p_q, p_bias, held[N // KEYS:], i_window, N // KEYS * KEYS + tl.arange(0, LAST), rows,
                          queries, state, image, stride, WH, WW, D, DP, COSINE, SHIFTED, PRECISION, FULL,
                          N % KEYS == LAST)
        for t in tl.static_range(len(rows)):
            _finish(p_o, p_l, queries[t], state[t], rows[t], stride, N, D, DP, FULL[t])


@lru_cache(maxsize=256)
def config(n: int, head_dim: int, dtype: torch.dtype) -> Tiling:
    """Tile sizes of the forward kernel for windows of ``n`` tokens.

    36 tokens are one tile of 64 rows: at 18 FLOP a byte the padded products still hide behind the memory, and
    three blocks of four warps an SM stay in flight; four packed windows would multiply the products by four.
    192 tokens are 3 tiles of 64 rows and 12 chunks of 16 keys: no key is padded.
    """
    wide = dtype == torch.float32 or head_dim > 32
    if n <= 64:
        rows = next_power(n)
        return Tiling(rows, 1, min(rows, 32) if wide else rows, True, max(rows // 16, 1), 1, 1, blocks_per_sm=3)
    if n <= 192 and not wide:
        return Tiling(64, -(-n // 64), 16, False, 4, 1, 1, blocks_per_sm=2)
    # In float32 64 rows of queries are more than the registers hold.
    return Tiling(32 if dtype == torch.float32 else 64, 1, 16 if wide else 32, False, 4, 1, 1, blocks_per_sm=3)


def forward(qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, num_heads: int,
            window_size: Sequence[int], shift_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel; arguments and results as the op ``fastmim::window_attention``.

    Args:
        qkv: (B, H, W, 3C); bfloat16, float16 or float32.
        bias: (heads, N, N), float32 or narrower.
        logit_scale: num_heads values, or None for softmax(q·k/√d).
        num_heads: Number of heads; divides C.
        window_size: (rows, columns), dividing (H, W).
        shift_size: (rows, columns) of the cyclic shift.

    Returns:
        The (B, H, W, C) output in the dtype of ``qkv``, and log2 Σ exp of the logits, (B·windows, heads, N)
        float32, for :func:`backward`.

    Raises:
        ValueError: An image has more than 2^31 values, beyond the kernels' offsets within an image.
    """
    qkv, window_size, shift_size = qkv.contiguous(), pair(window_size), pair(shift_size)
    batch, height, width, c3 = qkv.shape
    if height * width * c3 >= 2**31:
        raise ValueError(f"window_attention: an image of qkv must have fewer than 2^31 values, got {tuple(qkv.shape)}")
    n, head_dim = window_size[0] * window_size[1], c3 // 3 // num_heads
    windows = batch * height * width // n
    out = torch.empty(batch, height, width, c3 // 3, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(windows, num_heads, n, dtype=torch.float32, device=qkv.device)
    bias, logit_scale = bias.contiguous(), None if logit_scale is None else logit_scale.contiguous()
    common = common_constexprs(head_dim, window_size, any(shift_size), qkv.dtype)
    sizes = (height, width, num_heads, *shift_size)
    if by_rows(n, head_dim, qkv.dtype):
        groups = window_groups(windows, num_heads, processors(qkv.device) * BLOCKS_PER_SM)
        rows_forward_kernel.run(qkv, bias, logit_scale, out, lse, windows, groups, *sizes, **common,
                                PARTS=parts(n), num_warps=WARPS.value, grid=(num_heads * groups,), warmup=False)
        return out, lse
    tiling = config(n, head_dim, qkv.dtype)
    tiles = cdiv(n, tiling.ROWS * tiling.TILES)
    groups = window_groups(windows, num_heads * tiles, processors(qkv.device) * tiling.blocks_per_sm)
    forward_kernel.run(
        qkv, bias, logit_scale, out, lse, windows, groups, *sizes, **common, **tile_constexprs(n, tiling),
        num_warps=tiling.num_warps, grid=(num_heads * groups, tiles), warmup=False)
    return out, lse
