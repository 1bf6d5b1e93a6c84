"""Shifted-window attention, backward: logits are recomputed from qkv and the log-sum-exp of the forward.

The bias gradient is a sum over all windows. Where N×N accumulators fit on the chip (windows up to 12×12), a
program keeps one head's sum in registers while it walks over its group of windows and writes it once; above,
it adds to its own N×N buffer in global memory. A second kernel adds the groups in a fixed order: no
atomics, so the gradient is bitwise repeatable.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .window_gradient_tiles import (
    key_side,
    key_step,
    logit_gradient,
    query_side,
    store_bias,
    store_keys,
    store_queries,
)
from .window_tiles import (
    MAX_LOGIT_SCALE,
    Tiling,
    bias_chunks,
    bias_tile,
    chunk,
    common_constexprs,
    full_tiles,
    head_scale,
    image_start,
    multiprocessors,
    next_power,
    tile_constexprs,
    whole,
    window_groups,
    window_seams,
)

ON_CHIP = 192
"""Largest N whose bias gradient stays in registers."""


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
    """HOLD keeps the one tile's bias and bias gradient in registers; else both are read chunk by chunk."""
    N: tl.constexpr = WH * WW
    COSINE: tl.constexpr = p_scale is not None
    FULL: tl.constexpr = full_tiles(N, ROWS, TILES)
    i_head = tl.program_id(0) % heads
    i_group = tl.program_id(0) // heads
    image = (height, width, shift_y, shift_x)
    stride = heads * D
    scale = head_scale(p_scale, i_head, D)
    p_bias += i_head.to(tl.int64) * (N * N)
    if p_partial is not None:
        p_partial += (i_head * groups + i_group).to(tl.int64) * (N * N)
    rows = ()
    dscale = ()
    for t in tl.static_range(TILES):
        rows = rows + (t * ROWS + tl.arange(0, ROWS),)
        dscale = dscale + (tl.zeros([ROWS], tl.float32),)
    held = ()
    sums = ()
    if HOLD:
        held = bias_chunks(p_bias, rows[0], N, KEYS, LAST, FULL[0])
        if p_partial is not None:
            for c in tl.static_range(len(held)):
                sums = sums + (tl.zeros(held[c].shape, tl.float32),)
    for i_window in tl.range(i_group, windows, groups, num_stages=STAGES):
        start = image_start(i_window, image, WH, WW)
        p_q = p_qkv + start * (3 * stride) + i_head * D
        p_dq = p_dqkv + start * (3 * stride) + i_head * D
        o_head = start * stride + i_head * D
        p_l = p_lse + (i_window * heads + i_head).to(tl.int64) * N
        pointers = (p_q, p_out + o_head, p_grad + o_head, p_l)
        queries = ()
        dq = ()
        for t in tl.static_range(TILES):
            queries = queries + (query_side(pointers, i_window, rows[t], image, stride, scale, WH, WW, D, DP,
                                            COSINE, FULL[t]),)
            dq = dq + (tl.zeros([ROWS, DP], tl.float32),)
        first = i_window == i_group
        if HOLD:
            new = ()
            for c in tl.static_range(N // KEYS):
                dq, added = key_step(
                    p_q + stride, p_dq + stride, p_bias, p_partial, (held[c],), sums[c:c + 1], i_window,
                    c * KEYS + tl.arange(0, KEYS), rows, queries, dq, first, image, stride, scale, WH, WW, D, DP,
                    COSINE, SHIFTED, PRECISION, FULL, True)
                new = new + added
        else:
            for j in tl.range(0, N // KEYS * KEYS, KEYS, num_stages=INNER, disable_licm=True):
                dq, _ = key_step(
                    p_q + stride, p_dq + stride, p_bias, p_partial, (), (), i_window, j + tl.arange(0, KEYS),
                    rows, queries, dq, first, image, stride, scale, WH, WW, D, DP, COSINE, SHIFTED, PRECISION,
                    FULL, True)
        if LAST > 0:
            dq, added = key_step(
                p_q + stride, p_dq + stride, p_bias, p_partial, held[N // KEYS:], sums[N // KEYS:], i_window,
                N // KEYS * KEYS + tl.arange(0, LAST), rows, queries, dq, first, image, stride, scale, WH, WW, D,
                DP, COSINE, SHIFTED, PRECISION, FULL, N % KEYS == LAST)
            if HOLD:
                new = new + added
        if HOLD:
            sums = new
        total = ()
        for t in tl.static_range(TILES):
            total = total + (store_queries(p_q, p_dq, queries[t], dq[t], dscale[t], rows[t], stride, scale,
                                           N, D, DP, COSINE, FULL[t], not HOLD),)
        dscale = total
        if not HOLD:
            # The next window adds to the sums that other threads of this program may have stored.
            tl.debug_barrier()
    if COSINE:
        shares = tl.zeros([ROWS], tl.float32)
        for t in tl.static_range(TILES):
            shares += dscale[t]
        tl.store(p_dscale + i_head * groups + i_group, tl.sum(shares, 0))
    for c in tl.static_range(len(sums)):
        o_j = c * KEYS + tl.arange(0, chunk(c, N, KEYS, LAST))
        store_bias(p_partial, sums[c], rows[0], o_j, N, FULL[0] and whole(c, N, KEYS, LAST))


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
    dscale = tl.zeros([ROWS], tl.float32)
    for i_window in tl.range(i_group, windows, groups, num_stages=1):
        first = image_start(i_window, image, WH, WW)
        p_q = p_qkv + first * (3 * stride) + i_head * D
        p_dq = p_dqkv + first * (3 * stride) + i_head * D
        o_head = first * stride + i_head * D
        pointers = (p_q, p_out + o_head, p_grad + o_head, p_lse + (i_window * heads + i_head).to(tl.int64) * N)
        seams = window_seams(i_window, image, WH, WW)
        for i in tl.range(0, N, ROWS, num_stages=1):
            o_i = i + tl.arange(0, ROWS)
            query = query_side(pointers, i_window, o_i, image, stride, scale, WH, WW, D, DP, COSINE, FULL)
            dq = tl.zeros([ROWS, DP], tl.float32)
            for j in tl.range(0, N, KEYS, num_stages=2):
                o_j = j + tl.arange(0, KEYS)
                key = key_side(p_q + stride, i_window, o_j, image, stride, WH, WW, D, DP, COSINE, FULL_J)
                bias = bias_tile(p_bias, o_i, o_j, N, FULL, FULL_J)
                _, ds = logit_gradient(query, key, seams, bias, COSINE, SHIFTED, PRECISION)
                dq = tl.dot(ds.to(key[1].dtype), key[1], dq, input_precision=PRECISION)
                if p_partial is not None:
                    m_sum = (o_i < N)[:, None] & (o_j < N)[None, :]
                    p_sum = p_partial + o_i[:, None] * N + o_j[None, :]
                    ds += tl.load(p_sum, mask=m_sum & (i_window > i_group), other=0.0)
                    tl.store(p_sum, ds, mask=m_sum)
            dscale = store_queries(p_q, p_dq, query, dq, dscale, o_i, stride, scale, N, D, DP, COSINE, FULL,
                                   True)
        for j in tl.range(0, N, KEYS, num_stages=1):
            o_j = j + tl.arange(0, KEYS)
            key = key_side(p_q + stride, i_window, o_j, image, stride, WH, WW, D, DP, COSINE, FULL_J)
            dk = tl.zeros([KEYS, DP], tl.float32)
            dv = tl.zeros([KEYS, DP], tl.float32)
            for i in tl.range(0, N, ROWS, num_stages=2):
                o_i = i + tl.arange(0, ROWS)
                query = query_side(pointers, i_window, o_i, image, stride, scale, WH, WW, D, DP, COSINE, FULL)
                bias = bias_tile(p_bias, o_i, o_j, N, FULL, FULL_J)
                p, ds = logit_gradient(query, key, seams, bias, COSINE, SHIFTED, PRECISION)
                dv = tl.dot(tl.trans(p.to(key[2].dtype)), query[2], dv, input_precision=PRECISION)
                dk = tl.dot(tl.trans(ds.to(key[2].dtype)), query[1], dk, input_precision=PRECISION)
            store_keys(p_dq + stride, key, dk, dv, o_j, stride, scale, N, D, DP, COSINE, FULL_J)
        # The next window adds to the sums that other threads of this program may have stored.
        tl.debug_barrier()
    if COSINE:
        tl.store(p_dscale + i_head * groups + i_group, tl.sum(dscale, 0))


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
    if p_dscale is not None:
        if tl.program_id(1) == 0:
            clamped = tl.load(p_scale + i_head).to(tl.float32) > MAX_LOGIT_SCALE
            tl.store(p_dscale_out + i_head, tl.where(clamped, 0.0, total_scale))


def config(n: int, head_dim: int, dtype: torch.dtype) -> Tiling:
    """Tile sizes of the backward kernel for windows of ``n`` tokens."""
    short = 2 if dtype == torch.float32 or head_dim > 32 else 1
    if n <= 64:
        return Tiling(next_power(n), 0, 32 // short, True, 4, 2, 3)
    if n <= 128:
        return Tiling(128, 0, 32 // short, False, 8, 1, 1)
    if n <= ON_CHIP:
        return Tiling(128, next_power(n - 128), 32 // short, False, 8, 1, 1)
    return Tiling(64, 0, 64 // short, False, 4, 2, 2)


def backward(grad_out: Tensor, qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, out: Tensor, lse: Tensor,
             num_heads: int, window_size: tuple[int, int], shift_size: tuple[int, int], bias_grad: bool = True
             ) -> tuple[Tensor, Tensor | None, Tensor | None]:
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
    tiling = config(n, head_dim, qkv.dtype)
    groups = window_groups(windows, num_heads, multiprocessors(qkv.device) * tiling.blocks_per_sm)
    new = {"dtype": torch.float32, "device": qkv.device}
    dqkv = torch.empty_like(qkv)
    partial = torch.empty(num_heads, groups, n, n, **new) if bias_grad else None
    dscale = None if logit_scale is None else torch.empty(num_heads, groups, **new)
    common = common_constexprs(head_dim, window_size, any(shift_size), qkv.dtype)
    tensors = (grad_out.contiguous(), qkv, bias.contiguous(), logit_scale, out, lse, dqkv, partial, dscale)
    integers = (windows, groups, height, width, num_heads, *shift_size)
    if n <= ON_CHIP:
        backward_kernel[(num_heads * groups,)](
            *tensors, *integers, **common, **tile_constexprs(n, tiling), num_warps=tiling.num_warps)
    else:
        backward_large_kernel[(num_heads * groups,)](
            *tensors, *integers, **common, ROWS=tiling.ROWS, KEYS=tiling.KEYS, num_warps=tiling.num_warps)
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
    total = None if logit_scale is None else torch.empty(logit_scale.shape, dtype=torch.float32, device=dbias.device)
    block = min(128, next_power(n * n))
    reduce_kernel[(heads, triton.cdiv(n * n, block))](partial, dscale, logit_scale, dbias, total, groups, n * n,
                                                      GROUPS=min(32, next_power(groups)), BLOCK=block)
    return dbias, total
