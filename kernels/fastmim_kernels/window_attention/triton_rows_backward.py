"""Shifted-window attention, backward, for windows of 65 to 144 tokens: one kernel for queries, one for keys.

The queries' kernel keeps the bias gradient of its 64 rows in registers over all windows of its group, so that it
goes to memory once a group; it leaves each query's delta and inverse norm for the keys' kernel, whose tiles have
keys for rows: there the probabilities and their gradients are the left operands of their products as they are, and
never pass through shared memory. Together seven products where five would do, for no sum is shared between programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_fragments import (
    CHUNK,
    ROWS,
    at,
    bias_map,
    chunks,
    key_order,
    load_fragment,
    load_rows,
    load_values,
    part_rows,
    row_order,
    starts,
    store_fragment,
    store_rows,
    thread_sums,
)
from .triton_gradient_tiles import through_norm
from .triton_tiles import LN2, LOG2E, head_scale, image_start, inverse_norm, token_rows


@triton.jit
def _keys(p_k, i_window, o_j, image, stride, WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
          COSINE: tl.constexpr, FULL: tl.constexpr):
    """(k, unit k, v, inverse norm) of a chunk of keys."""
    o_row = token_rows(i_window, o_j, image, WH, WW)
    m_j = None if FULL else o_j < WH * WW
    k = load_rows(p_k, o_row, m_j, 3 * stride, D, DP)
    v = load_rows(p_k + stride, o_row, m_j, 3 * stride, D, DP)
    if COSINE:
        inverse = inverse_norm(k)
        return k, (k.to(tl.float32) * inverse[:, None]).to(k.dtype), v, inverse
    else:
        return k, k, v, tl.zeros(o_j.shape, tl.float32)


@triton.jit
def rows_queries_kernel(
    p_grad,  # (B, H, W, heads, D)
    p_qkv,  # (B, H, W, 3, heads, D)
    p_bias,  # (heads, 4 where SHIFTED else 1, N, N)
    p_scale,  # (heads,) or None
    p_out,  # (B, H, W, heads, D)
    p_lse,  # (B·windows, heads, N) float32
    p_dqkv,  # (B, H, W, 3, heads, D), of which this kernel writes dq
    p_partial,  # (heads, groups, N, N) float32, or None when the bias needs no gradient
    p_dscale,  # (heads, groups, PARTS) float32, or None
    p_rows,  # (B·windows, heads, 2, N) float32: delta of each query, its inverse norm
    windows, groups, height, width, heads, shift_y, shift_x,
    WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr,
):
    N: tl.constexpr = WH * WW
    COSINE: tl.constexpr = p_scale is not None
    WIDTHS: tl.constexpr = chunks(N, CHUNK)
    STARTS: tl.constexpr = starts(N, CHUNK)
    i_head = tl.program_id(0) % heads
    i_part = tl.program_id(0) // heads % PARTS
    i_group = tl.program_id(0) // heads // PARTS
    image = (height, width, shift_y, shift_x)
    stride = heads * D
    scale = head_scale(p_scale, i_head, D)
    i_first, i_end = part_rows(i_part, N, PARTS)
    dscale = tl.zeros([ROWS], tl.float32)
    dbias = ()
    for c in tl.static_range(len(WIDTHS)):
        dbias = dbias + (tl.zeros([ROWS, at(WIDTHS, c)], tl.float32),)
    for i_window in tl.range(i_group, windows, groups, num_stages=1, disable_licm=True):
        # 0, but not for the compiler: offsets made with it are computed here and fill no registers of the loop.
        late = tl.minimum(i_window, 0)
        first = image_start(i_window, image, WH, WW)
        p_q = p_qkv + first * (3 * stride) + i_head * D
        o_head = first * stride + i_head * D
        o_lse = (i_window * heads + i_head).to(tl.int64) * N
        p_map = bias_map(p_bias, i_head, i_window, image, WH, WW, SHIFTED)
        o_i = late + i_first + row_order()
        m_i = o_i < i_end
        o_row = token_rows(i_window, o_i, image, WH, WW)
        q = load_rows(p_q, o_row, m_i, 3 * stride, D, DP)
        grad = load_rows(p_grad + o_head, o_row, m_i, stride, D, DP)
        out = load_rows(p_out + o_head, o_row, m_i, stride, D, DP)
        lse = tl.load(p_lse + o_lse + o_i, mask=m_i, other=1e30)
        delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
        tl.store(p_rows + 2 * o_lse + o_i, delta, mask=m_i)
        factor = tl.zeros([ROWS], tl.float32) + scale * LOG2E
        if COSINE:
            inverse = inverse_norm(q)
            tl.store(p_rows + 2 * o_lse + N + o_i, inverse, mask=m_i)
            factor *= inverse
        dq = tl.zeros([ROWS, DP], tl.float32)
        sum_dss = tl.zeros([ROWS, 4], tl.float32)
        sum_ds = tl.zeros([ROWS, 4], tl.float32)
        sum_ps = tl.zeros([ROWS, 4], tl.float32)
        new = ()
        for c in tl.static_range(len(WIDTHS)):
            k, unit, v, key_scale = _keys(p_q + stride, i_window, late + STARTS[c] + key_order(WIDTHS[c]), image,
                                          stride, WH, WW, D, DP, COSINE, STARTS[c] + WIDTHS[c] <= N)
            bias = load_fragment(p_map, late + i_first, i_end, STARTS[c], N, WIDTHS[c])
            # The norms scale the product, so that q and k enter it unrounded.
            s = tl.dot(q, tl.trans(k))
            if COSINE:
                s *= key_scale[None, :]
            p = tl.exp2(s * factor[:, None] + (bias * LOG2E - lse[:, None]))
            ds = p * (tl.dot(grad, tl.trans(v)) - delta[:, None])
            if COSINE:
                sum_dss += thread_sums(ds * s, WIDTHS[c])
                sum_ds += thread_sums(ds, WIDTHS[c])
                sum_ps += thread_sums(p * s, WIDTHS[c])
            dq = tl.dot(ds.to(k.dtype), unit, dq)
            new = new + (dbias[c] + ds if p_partial is not None else dbias[c],)
        dbias = new
        # Read again, from L1, rather than kept in registers over the chunks; so are the offsets.
        o_i = tl.minimum(i_window, 0) + i_first + row_order()
        m_i = o_i < i_end
        o_row = token_rows(i_window, o_i, image, WH, WW)
        q = load_rows(p_q, o_row, m_i, 3 * stride, D, DP)
        inverse = inverse_norm(q) if COSINE else delta
        dq = through_norm(dq, q.to(tl.float32) * inverse[:, None], inverse, scale, COSINE)
        store_rows(p_dqkv + first * (3 * stride) + i_head * D, dq, o_row, m_i, 3 * stride, D, DP)
        if COSINE:
            # Over all keys Σ ds would be 0 but for the rounding of the stored output in delta: this is free of it.
            dscale += (tl.sum(sum_dss, 1) - tl.sum(sum_ds, 1) * tl.sum(sum_ps, 1)) * factor
    if COSINE:
        tl.store(p_dscale + (i_head * groups + i_group) * PARTS + i_part, tl.sum(dscale, 0) * LN2)
    if p_partial is not None:
        p_sum = p_partial + (i_head * groups + i_group).to(tl.int64) * (N * N)
        for c in tl.static_range(len(WIDTHS)):
            store_fragment(p_sum, dbias[c], i_first, i_end, STARTS[c], N, WIDTHS[c])


@triton.jit
def rows_keys_kernel(
    p_grad,  # (B, H, W, heads, D)
    p_qkv,  # (B, H, W, 3, heads, D)
    p_turned,  # (heads, 4 where SHIFTED else 1, N, N) float32, keys for rows
    p_scale,  # (heads,) or None
    p_lse,  # (B·windows, heads, N) float32
    p_dqkv,  # (B, H, W, 3, heads, D), of which this kernel writes dk and dv
    p_rows,  # (B·windows, heads, 2, N) float32, from rows_queries_kernel
    windows, groups, height, width, heads, shift_y, shift_x,
    WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr,
):
    N: tl.constexpr = WH * WW
    COSINE: tl.constexpr = p_scale is not None
    WIDTHS: tl.constexpr = chunks(N, CHUNK)
    STARTS: tl.constexpr = starts(N, CHUNK)
    i_head = tl.program_id(0) % heads
    i_group = tl.program_id(0) // heads
    image = (height, width, shift_y, shift_x)
    stride = heads * D
    scale = head_scale(p_scale, i_head, D)
    for i_window in tl.range(i_group, windows, groups, num_stages=1, disable_licm=True):
        late = tl.minimum(i_window, 0)
        first = image_start(i_window, image, WH, WW)
        p_q = p_qkv + first * (3 * stride) + i_head * D
        p_dk = p_dqkv + first * (3 * stride) + i_head * D + stride
        o_lse = (i_window * heads + i_head).to(tl.int64) * N
        p_map = bias_map(p_turned, i_head, i_window, image, WH, WW, SHIFTED)
        queries = ()
        for c in tl.static_range(len(WIDTHS)):
            o_i = late + STARTS[c] + key_order(WIDTHS[c])
            o_row = token_rows(i_window, o_i, image, WH, WW)
            m_i = None if STARTS[c] + WIDTHS[c] <= N else o_i < N
            q = load_rows(p_q, o_row, m_i, 3 * stride, D, DP)
            grad = load_rows(p_grad + first * stride + i_head * D, o_row, m_i, stride, D, DP)
            unit = q
            if COSINE:
                norm = load_values(p_rows + 2 * o_lse + N, o_i, N, STARTS[c] + WIDTHS[c] <= N)
                unit = (q.to(tl.float32) * norm[:, None]).to(q.dtype)
            queries = queries + ((q, unit, grad),)
        for t in tl.range(0, PARTS, num_stages=1, disable_licm=True):
            i_first, i_end = part_rows(late + t, N, PARTS)
            o_j = i_first + row_order()
            m_j = o_j < i_end
            o_key = token_rows(i_window, o_j, image, WH, WW)
            k = load_rows(p_q + stride, o_key, m_j, 3 * stride, D, DP)
            v = load_rows(p_q + 2 * stride, o_key, m_j, 3 * stride, D, DP)
            inverse = inverse_norm(k) if COSINE else tl.full([ROWS], 1.0, tl.float32)
            dk = tl.zeros([ROWS, DP], tl.float32)
            dv = tl.zeros([ROWS, DP], tl.float32)
            for c in tl.static_range(len(WIDTHS)):
                q, unit, grad = queries[c]
                # Their three values are read again, from L1: for all queries they would fill the registers.
                o_i = tl.minimum(t, 0) + STARTS[c] + key_order(WIDTHS[c])
                bias = load_fragment(p_map, i_first, i_end, STARTS[c], N, WIDTHS[c])
                lse = load_values(p_lse + o_lse, o_i, N, STARTS[c] + WIDTHS[c] <= N)
                delta = load_values(p_rows + 2 * o_lse, o_i, N, STARTS[c] + WIDTHS[c] <= N)
                s = tl.dot(k, tl.trans(q))
                if COSINE:
                    s *= load_values(p_rows + 2 * o_lse + N, o_i, N, STARTS[c] + WIDTHS[c] <= N)[None, :]
                p = tl.exp2(s * (inverse * (scale * LOG2E))[:, None] + (bias * LOG2E - lse[None, :]))
                dv = tl.dot(p.to(k.dtype), grad, dv)
                ds = p * (tl.dot(v, tl.trans(grad)) - delta[None, :])
                dk = tl.dot(ds.to(k.dtype), unit, dk)
            dk = through_norm(dk, k.to(tl.float32) * inverse[:, None], inverse, scale, COSINE)
            store_rows(p_dk, dk, o_key, m_j, 3 * stride, D, DP)
            store_rows(p_dk + stride, dv, o_key, m_j, 3 * stride, D, DP)
