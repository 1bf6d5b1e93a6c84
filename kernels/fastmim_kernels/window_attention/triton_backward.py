"""Shifted-window attention, backward: logits are recomputed from qkv and the log-sum-exp of the forward.

The bias gradient is a sum over all windows: a program walks over a group of windows of one head and sums in
registers (windows up to 8×8) or in its own N×N buffer in global memory, small enough for L2. A second kernel
adds the groups in a fixed order, so that the gradient is bitwise repeatable. On sm_90 windows of 65 to 144 tokens
take one launch of whole rows instead (``triton_rows_backward``), whose sums stay in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.device import processors, sm_of
from ..common.rows import nothing
from ..common.sizes import cdiv
from .layout import pair
from .triton_gradient_tiles import (
    add_bias,
    add_shares,
    key_side,
    logit_gradient,
    query_side,
    store_bias,
    store_keys,
    store_queries,
)
from .triton_rows_launch import backward_by_rows, rows_backward
from .triton_tiles import (
    LN2,
    MAX_LOGIT_SCALE,
    Tiling,
    bias_tile,
    common_constexprs,
    head_scale,
    image_start,
    next_power,
    window_groups,
    window_seams,
)


@triton.jit(do_not_specialize=["windows", "groups", "height", "width", "heads", "shift_y", "shift_x"])
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
    PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):
    """Up to 64 tokens: one tile holds all queries and keys, and its bias gradient stays in registers.

    A row of logits is whole, so that neither the output of the forward nor a second read of q is needed.
    """
    N: tl.constexpr = WH * WW
    COSINE: tl.constexpr = p_scale is not None
    FULL: tl.constexpr = N == ROWS
    i_head = tl.program_id(0) % heads
    i_group = tl.program_id(0) // heads
    image = (height, width, shift_y, shift_x)
    stride = heads * D
    scale = head_scale(p_scale, i_head, D)
    p_bias += i_head.to(tl.int64) * (N * N)
    o_i = tl.arange(0, ROWS)
    o_j = tl.arange(0, KEYS)
    dscale = tl.zeros([ROWS], tl.float32)
    dbias = tl.zeros([ROWS, KEYS], tl.float32)
    for i_window in tl.range(i_group, windows, groups, num_stages=1, disable_licm=True):
        first = image_start(i_window, image, WH, WW)
        p_q = p_qkv + first * (3 * stride) + i_head * D
        p_dq = p_dqkv + first * (3 * stride) + i_head * D
        o_head = first * stride + i_head * D
        p_l = p_lse + (i_window * heads + i_head).to(tl.int64) * N
        pointers = (p_q, p_out + o_head, p_grad + o_head, p_l)
        query = query_side(pointers, i_window, o_i, image, stride, scale, WH, WW, D, DP, COSINE, FULL, True)
        key = key_side(p_q + stride, i_window, o_j, image, stride, WH, WW, D, DP, COSINE, FULL)
        seams = window_seams(i_window, image, WH, WW)
        bias = bias_tile(p_bias, o_i, o_j, N, FULL, FULL)
        p, ds, share = logit_gradient(query, key, seams, bias, COSINE, SHIFTED, PRECISION, True)
        dv = tl.dot(tl.trans(p.to(key[2].dtype)), query[2], input_precision=PRECISION)
        low = ds.to(key[2].dtype)
        dk = tl.dot(tl.trans(low), query[1], input_precision=PRECISION)
        dq = tl.dot(low, key[1], input_precision=PRECISION)
        dbias += ds
        store_keys(p_dq + stride, key, dk, dv, o_j, stride, scale, N, D, DP, COSINE, FULL)
        store_queries(p_q, p_dq, query, dq, o_i, stride, scale, N, D, DP, COSINE, FULL, False)
        # Here, after the stores: before them sm_90 spills a register at 64 tokens with cosine.
        dscale += share[0] - share[1] * share[2]
    if COSINE:
        tl.store(p_dscale + i_head * groups + i_group, tl.sum(dscale, 0) * LN2)
    if p_partial is not None:
        store_bias(p_partial + (i_head * groups + i_group).to(tl.int64) * (N * N), dbias, o_i, o_j, N, FULL)


@triton.jit(do_not_specialize=["windows", "groups", "height", "width", "heads", "shift_y", "shift_x"])
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


@triton.jit(do_not_specialize=["groups"])
def reduce_kernel(
    p_partial,  # (heads, groups, size) float32
    p_dscale,  # (heads, groups) float32, or None
    p_scale,  # (heads,) or None
    p_out,  # (heads, size) float32
    p_dscale_out,  # (heads,) float32, or None
    groups, size,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):
    i_head = tl.program_id(1)
    o_size = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
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
        if tl.program_id(0) == 0:
            clamped = tl.load(p_scale + i_head).to(tl.float32) > MAX_LOGIT_SCALE
            tl.store(p_dscale_out + i_head, tl.where(clamped, 0.0, total_scale))


OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
"""Triton's allocation of registers is that of 3.6, which needs more of them."""


def single_tile(n: int, head_dim: int, dtype: torch.dtype, arch: int, cosine: bool) -> bool:
    """Whether ``backward_kernel`` takes windows of ``n`` tokens, not ``backward_large_kernel``.

    That one keeps only a tile of queries and of keys on chip: for more than 64 tokens, for wide rows (float32,
    heads of 64), and where one tile would spill registers: cosine attention on sm_80, and everywhere by a Triton
    before 3.7.
    """
    spills = cosine and (arch < 90 or OLD)
    return n <= 64 and dtype != torch.float32 and head_dim <= 32 and not spills


def registers(n: int, head_dim: int, dtype: torch.dtype, arch: int, cosine: bool) -> int | None:
    """Limit of ``maxnreg`` where the compiler would spill to fit one block more.

    On sm_90 four of wide heads, where three fit; on sm_80 three of a single tile, where two are launched.
    """
    if arch == 90 and head_dim > 32 and dtype != torch.float32:
        return 168
    return 255 if arch < 90 and not OLD and single_tile(n, head_dim, dtype, arch, cosine) else None


@lru_cache(maxsize=256)
def config(n: int, head_dim: int, dtype: torch.dtype, arch: int, cosine: bool) -> Tiling:
    """Tile sizes of the kernel that :func:`single_tile` chooses: the largest that do not spill."""
    if single_tile(n, head_dim, dtype, arch, cosine):
        rows, warps = next_power(n), max(next_power(n) // 16, 1)
        # Twice the warps of one block are as many as those of two, and hold half as much each.
        alone = cosine or (arch < 90 and OLD)
        return Tiling(rows, 1, rows, True, 2 * warps if alone else warps, 1, 1, blocks_per_sm=1 if alone else 2)
    if dtype == torch.float32 or head_dim > 32:
        return Tiling(32, 1, 16, False, 4, 1, 1, blocks_per_sm=2)
    return Tiling(64 if arch >= 90 and n > 64 else 32, 1, 32, False, 4, 1, 1, blocks_per_sm=2)


def backward(grad_out: Tensor, qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, out: Tensor,
             lse: Tensor, num_heads: int, window_size: Sequence[int], shift_size: Sequence[int],
             bias_grad: bool = True) -> tuple[Tensor, Tensor | None, Tensor]:
    """Launch the backward kernel and what comes before it or after; as ``fastmim::window_attention_backward``.

    Args:
        grad_out: (B, H, W, C), gradient of the output.
        qkv, bias, logit_scale, num_heads, window_size, shift_size: As given to ``forward``.
        out: (B, H, W, C) that ``forward`` returned.
        lse: (B·windows, heads, N) that ``forward`` returned.
        bias_grad: False saves the bias gradient's work.

    Returns:
        Gradients of qkv (its dtype), bias (float32; None without ``bias_grad``) and logit_scale (float32, its
        shape; empty without a logit scale; zero where it is clamped).
    """
    grad_out, qkv, bias = grad_out.contiguous(), qkv.contiguous(), bias.contiguous()
    logit_scale = None if logit_scale is None else logit_scale.contiguous()
    window_size, shift_size = pair(window_size), pair(shift_size)
    batch, height, width, c3 = qkv.shape
    n, head_dim = window_size[0] * window_size[1], c3 // 3 // num_heads
    windows = batch * height * width // n
    arch = sm_of(qkv.device)
    if backward_by_rows(n, head_dim, qkv.dtype, arch):
        dqkv, dbias, total = rows_backward(grad_out, qkv, bias, logit_scale, out, lse, num_heads, window_size,
                                           shift_size, bias_grad)
        return dqkv, dbias, nothing(lse) if total is None else total
    which = (n, head_dim, qkv.dtype, arch, logit_scale is not None)
    tiling = config(*which)
    groups = window_groups(windows, num_heads, processors(qkv.device) * tiling.blocks_per_sm)
    new = {"dtype": torch.float32, "device": qkv.device}
    dqkv = torch.empty_like(qkv)
    partial = torch.empty(num_heads, groups, n, n, **new) if bias_grad else None
    dscale = None if logit_scale is None else torch.empty(num_heads, groups, **new)
    common = common_constexprs(head_dim, window_size, any(shift_size), qkv.dtype)
    arguments = (grad_out, qkv, bias, logit_scale, out, lse, dqkv, partial, dscale,
                 windows, groups, height, width, num_heads, *shift_size)
    kernel = backward_kernel if single_tile(*which) else backward_large_kernel
    kernel.run(
        *arguments, **common, ROWS=tiling.ROWS, KEYS=tiling.KEYS, num_warps=tiling.num_warps,
        maxnreg=registers(*which), grid=(num_heads * groups,), warmup=False)
    dbias, total = _reduce(partial, dscale, logit_scale)
    return dqkv, dbias, nothing(lse) if total is None else total


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
    reduce_kernel.run(
        partial, dscale, logit_scale, dbias, total, groups, n * n, GROUPS=16, BLOCK=256,
        grid=(cdiv(n * n, 256), heads), warmup=False)
    return dbias, total
