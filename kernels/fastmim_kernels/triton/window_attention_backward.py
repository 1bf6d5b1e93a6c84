"""Shifted-window attention, backward: logits are recomputed from qkv and the log-sum-exp of the forward.

The bias gradient is a sum over all windows: a program walks over a group of windows of one head and sums in
registers (windows up to 8×8) or in its own N×N buffer in global memory, small enough for L2. A second kernel
adds the groups in a fixed order: no atomics, so the gradient is bitwise repeatable.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .window_gradient_tiles import (
    add_bias,
    add_shares,
    key_side,
    key_step,
    logit_gradient,
    query_side,
    store_bias,
    store_keys,
    store_queries,
)
from .window_tiles import (
    LN2,
    MAX_LOGIT_SCALE,
    Tiling,
    architecture,
    bias_tile,
    chunk_offsets,
    common_constexprs,
    full_chunks,
    full_tiles,
    head_scale,
    image_start,
    multiprocessors,
    next_power,
    tile_constexprs,
    window_groups,
    window_seams,
)


@triton.jit
def backward_kernel(
    p_grad,  # (B, H, W, heads, D)
    p_qkv,  # (B, H, W, 3, heads, D)
    p_bias,  # (heads, N, N)
    p_scale,  # (heads,) or None
    p_out,  # (B, H, W, heads, D)
    p_lse,  # (B·windows, heads, N) float32
    p_dqkv,  # (B, H, W, 3, heads, D)
    p_partial,  # (heads, groups, N, N) float32, or None when the bias needs no gradient
    p_dscale,  # (heads, groups) float32, or None
    windows, groups, height, width, heads, shift_y, shift_x,
    WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, KEYS: tl.constexpr, LAST: tl.constexpr,
    HOLD: tl.constexpr, STAGES: tl.constexpr, INNER: tl.constexpr,
):
    """All queries of a window stay on chip while chunks of its keys pass by: one read and one write a window.

    HOLD: the one tile of queries keeps its bias gradient in registers over all windows, and meets all keys at
    once, so that it needs no output of the forward.
    """
    N: tl.constexpr = WH * WW
    COSINE: tl.constexpr = p_scale is not None
    FULL: tl.constexpr = full_tiles(N, ROWS, TILES)
    FULL_J: tl.constexpr = full_chunks(N, KEYS, LAST)
    i_head = tl.program_id(0) % heads
    i_group = tl.program_id(0) // heads
    image = (height, width, shift_y, shift_x)
    stride = heads * D
    scale = head_scale(p_scale, i_head, D)
    p_bias += i_head.to(tl.int64) * (N * N)
    if p_partial is not None:
        p_partial += (i_head * groups + i_group).to(tl.int64) * (N * N)
    o_keys = chunk_offsets(N, KEYS, LAST)
    rows = ()
    for t in tl.static_range(TILES):
        rows = rows + (t * ROWS + tl.arange(0, ROWS),)
    zeros = tl.zeros([ROWS], tl.float32)
    dscale = zeros
    sums = ()
    if HOLD and p_partial is not None:
        for c in tl.static_range(len(o_keys)):
            sums = sums + (tl.zeros([ROWS, o_keys[c].shape[0]], tl.float32),)
    for i_window in tl.range(i_group, windows, groups, num_stages=STAGES, disable_licm=True):
        start = image_start(i_window, image, WH, WW)
        p_q = p_qkv + start * (3 * stride) + i_head * D
        p_dq = p_dqkv + start * (3 * stride) + i_head * D
        o_head = start * stride + i_head * D
        p_l = p_lse + (i_window * heads + i_head).to(tl.int64) * N
        pointers = (p_q, p_out + o_head, p_grad + o_head, p_l)
        queries = ()
        dq = ()
        shares = ()
        for t in tl.static_range(TILES):
            queries = queries + (query_side(pointers, i_window, rows[t], image, stride, scale, WH, WW, D, DP,
                                            COSINE, FULL[t], HOLD),)
            dq = dq + (tl.zeros([ROWS, DP], tl.float32),)
            shares = shares + ((zeros, zeros, zeros),)
        later = i_window > i_group
        if HOLD:
            new = ()
            for c in tl.static_range(len(o_keys)):
                dq, shares, added = key_step(
                    p_q + stride, p_dq + stride, p_bias, None, sums[c:c + 1], i_window, o_keys[c], rows,
                    queries, dq, shares, later, image, stride, scale, WH, WW, D, DP, COSINE, SHIFTED, PRECISION, FULL,
                    FULL_J[c], True)
                new = new + added
            sums = new
        else:
            for j in tl.range(0, N, KEYS, num_stages=INNER, disable_licm=True):
                dq, shares, _ = key_step(
                    p_q + stride, p_dq + stride, p_bias, p_partial, (), i_window, j + tl.arange(0, KEYS),
                    rows, queries, dq, shares, later, image, stride, scale, WH, WW, D, DP, COSINE, SHIFTED, PRECISION,
                    FULL, N % KEYS == 0, False)
            # The next window adds to the sums that other threads of this program may have stored.
            tl.debug_barrier()
        for t in tl.static_range(TILES):
            store_queries(p_q, p_dq, queries[t], dq[t], rows[t], stride, scale, N, D, DP, COSINE, FULL[t], not HOLD)
            dscale += shares[t][0] - shares[t][1] * shares[t][2]
    if COSINE:
        tl.store(p_dscale + i_head * groups + i_group, tl.sum(dscale, 0) * LN2)
    for c in tl.static_range(len(sums)):
        store_bias(p_partial, sums[c], rows[0], o_keys[c], N, FULL[0] and FULL_J[c])


@triton.jit
def backward_large_kernel(
    p_grad, p_qkv, p_bias, p_scale, p_out, p_lse, p_dqkv, p_partial, p_dscale,  # as in backward_kernel
    windows, groups, height, width, heads, shift_y, shift_x,
    WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):
    """Queries in the outer loop for dq and the bias, then keys in the outer loop for dk and dv."""
    N: tl.constexpr = WH * WW
    FULL: tl.constexpr = N % ROWS == 0
    FULL_J: tl.constexpr = N % KEYS == 0
    COSINE: tl.constexpr = p_scale is not None
    i_head = tl.program_id(0) % heads
    i_group = tl.program_id(0) // heads
    image = (height, width, shift_y, shift_x)
    stride = heads * D
    scale = head_scale(p_scale, i_head, D)
    p_bias += i_head.to(tl.int64) * (N * N)
    if p_partial is not None:
        p_partial += (i_head * groups + i_group).to(tl.int64) * (N * N)
    zeros = tl.zeros([ROWS], tl.float32)
    dscale = zeros
    for i_window in tl.range(i_group, windows, groups, num_stages=1, disable_licm=True):
        first = image_start(i_window, image, WH, WW)
        p_q = p_qkv + first * (3 * stride) + i_head * D
        p_dq = p_dqkv + first * (3 * stride) + i_head * D
        o_head = first * stride + i_head * D
        p_l = p_lse + (i_window * heads + i_head).to(tl.int64) * N
        pointers = (p_q, p_out + o_head, p_grad + o_head, p_l)
        seams = window_seams(i_window, image, WH, WW)
        for i in tl.range(0, N, ROWS, num_stages=1, disable_licm=True):
            o_i = i + tl.arange(0, ROWS)
            query = query_side(pointers, i_window, o_i, image, stride, scale, WH, WW, D, DP, COSINE, FULL, False)
            dq = tl.zeros([ROWS, DP], tl.float32)
            shares = (zeros, zeros, zeros)
            for j in tl.range(0, N, KEYS, num_stages=1, disable_licm=True):
                o_j = j + tl.arange(0, KEYS)
                key = key_side(p_q + stride, i_window, o_j, image, stride, WH, WW, D, DP, COSINE, FULL_J)
                bias = bias_tile(p_bias, o_i, o_j, N, FULL, FULL_J)
                _, ds, share = logit_gradient(query, key, seams, bias, COSINE, SHIFTED, PRECISION, False)
                shares = add_shares(shares, share, COSINE)
                dq = tl.dot(ds.to(key[1].dtype), key[1], dq, input_precision=PRECISION)
                if p_partial is not None:
                    add_bias(p_partial, ds, o_i, o_j, i_window > i_group, N, FULL and FULL_J)
            dscale += shares[0] - shares[1] * shares[2]
            store_queries(p_q, p_dq, query, dq, o_i, stride, scale, N, D, DP, COSINE, FULL, True)
        for j in tl.range(0, N, KEYS, num_stages=1, disable_licm=True):
            o_j = j + tl.arange(0, KEYS)
            key = key_side(p_q + stride, i_window, o_j, image, stride, WH, WW, D, DP, COSINE, FULL_J)
            dk = tl.zeros([KEYS, DP], tl.float32)
            dv = tl.zeros([KEYS, DP], tl.float32)
            for i in tl.range(0, N, ROWS, num_stages=1, disable_licm=True):
                o_i = i + tl.arange(0, ROWS)
                query = query_side(pointers, i_window, o_i, image, stride, scale, WH, WW, D, DP, COSINE, FULL, False)
                bias = bias_tile(p_bias, o_i, o_j, N, FULL, FULL_J)
                p, ds, _ = logit_gradient(query, key, seams, bias, COSINE, SHIFTED, PRECISION, False)
                dv = tl.dot(tl.trans(p.to(key[2].dtype)), query[2], dv, input_precision=PRECISION)
                dk = tl.dot(tl.trans(ds.to(key[2].dtype)), query[1], dk, input_precision=PRECISION)
            store_keys(p_dq + stride, key, dk, dv, o_j, stride, scale, N, D, DP, COSINE, FULL_J)
        # The next window adds to the sums that other threads of this program may have stored.
        tl.debug_barrier()
    if COSINE:
        tl.store(p_dscale + i_head * groups + i_group, tl.sum(dscale, 0) * LN2)


@triton.jit
def reduce_kernel(
    p_partial,  # (heads, groups, size) float32
    p_dscale,  # (heads, groups) float32, or None
    p_scale,  # (heads,) or None
    p_out,  # (heads, size) float32
    p_dscale_out,  # (heads,) float32, or None
    groups, size,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):
    i_head = tl.program_id(0)
    o_size = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    total_scale = 0.0
    for g in tl.range(0, groups, GROUPS):
        o_group = (i_head * groups + g + tl.arange(0, GROUPS)).to(tl.int64)
        m_group = g + tl.arange(0, GROUPS) < groups
        p_tile = p_partial + o_group[:, None] * size + o_size[None, :]
        total += tl.sum(tl.load(p_tile, mask=m_group[:, None] & (o_size < size)[None, :], other=0.0), 0)
        if p_dscale is not None:
            total_scale += tl.sum(tl.load(p_dscale + o_group, mask=m_group, other=0.0), 0)
    tl.store(p_out + i_head.to(tl.int64) * size + o_size, total, mask=o_size < size)
    if p_dscale is not None:  # noqa: SIM102 - decided when compiled, the inner one at run time
        if tl.program_id(1) == 0:
            clamped = tl.load(p_scale + i_head).to(tl.float32) > MAX_LOGIT_SCALE
            tl.store(p_dscale_out + i_head, tl.where(clamped, 0.0, total_scale))


def config(n: int, head_dim: int, dtype: torch.dtype, arch: int, cosine: bool) -> Tiling | None:
    """Tile sizes of ``backward_kernel`` for windows of ``n`` tokens; None: take ``backward_large_kernel``.

    That one keeps only a tile of queries and of keys on chip: for large windows, for wide rows (float32, heads
    of 64), and on sm_80, where cosine attention or 144 queries would spill a few registers.
    """
    if dtype == torch.float32 or head_dim > 32 or (arch < 90 and (cosine or n > 64)):
        return None
    if n <= 64:
        rows, warps = next_power(n), max(next_power(n) // 16, 1)
        return Tiling(rows, 1, rows, True, 2 * warps if cosine else warps, 1, 1, blocks_per_sm=1 if cosine else 2)
    return Tiling(64, -(-n // 64), 16, False, 8, 1, 2, blocks_per_sm=1) if n <= 192 else None


def large_config(head_dim: int, dtype: torch.dtype) -> Tiling:
    """Tile sizes of ``backward_large_kernel``."""
    wide = dtype == torch.float32 or head_dim > 32
    return Tiling(32, 1, 16 if wide else 32, False, 4, 1, 1, blocks_per_sm=2)


def backward(grad_out: Tensor, qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, out: Tensor,
             lse: Tensor, num_heads: int, window_size: tuple[int, int], shift_size: tuple[int, int],
             bias_grad: bool = True) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Launch the backward kernel and the reduction of its partial sums.

    Args:
        grad_out: (B, H, W, C), gradient of the output.
        qkv, bias, logit_scale, num_heads, window_size, shift_size: As given to ``forward``.
        out: (B, H, W, C) that ``forward`` returned.
        lse: (B·windows, heads, N) that ``forward`` returned.
        bias_grad: False saves the bias gradient's work.

    Returns:
        Gradients of qkv (its dtype), bias (float32; None without ``bias_grad``) and logit_scale (float32, its
        shape; None without a logit scale; zero where it is clamped).
    """
    batch, height, width, c3 = qkv.shape
    n, head_dim = window_size[0] * window_size[1], c3 // 3 // num_heads
    windows = batch * height * width // n
    single = config(n, head_dim, qkv.dtype, architecture(qkv.device), logit_scale is not None)
    tiling = single or large_config(head_dim, qkv.dtype)
    groups = window_groups(windows, num_heads, multiprocessors(qkv.device) * tiling.blocks_per_sm)
    new = {"dtype": torch.float32, "device": qkv.device}
    dqkv = torch.empty_like(qkv)
    partial = torch.empty(num_heads, groups, n, n, **new) if bias_grad else None
    dscale = None if logit_scale is None else torch.empty(num_heads, groups, **new)
    common = common_constexprs(head_dim, window_size, any(shift_size), qkv.dtype)
    arguments = (grad_out.contiguous(), qkv, bias.contiguous(), logit_scale, out, lse, dqkv, partial, dscale,
                 windows, groups, height, width, num_heads, *shift_size)
    if single:
        backward_kernel[(num_heads * groups,)](
            *arguments, **common, **tile_constexprs(n, tiling), num_warps=tiling.num_warps)
    else:
        backward_large_kernel[(num_heads * groups,)](
            *arguments, **common, ROWS=tiling.ROWS, KEYS=tiling.KEYS, num_warps=tiling.num_warps)
    return dqkv, *_reduce(partial, dscale, logit_scale)


def _reduce(partial: Tensor | None, dscale: Tensor | None, logit_scale: Tensor | None
            ) -> tuple[Tensor | None, Tensor | None]:
    """Sums over the groups in a fixed order."""
    if partial is None:
        if dscale is None or logit_scale is None:
            return None, None
        kept = logit_scale.reshape(-1) <= MAX_LOGIT_SCALE.value
        return None, (dscale.sum(1) * kept).reshape(logit_scale.shape)
    heads, groups, n, _ = partial.shape
    dbias = torch.empty(heads, n, n, dtype=torch.float32, device=partial.device)
    total = None
    if logit_scale is not None:
        total = torch.empty(logit_scale.shape, dtype=torch.float32, device=partial.device)
    reduce_kernel[(heads, triton.cdiv(n * n, 256))](
        partial, dscale, logit_scale, dbias, total, groups, n * n, GROUPS=16, BLOCK=256)
    return dbias, total
