"""Shifted-window attention, backward, for windows of 65 to 144 tokens: one launch whose programs have one of two roles.

Programs of queries keep the bias gradient of their 64 rows in registers over all windows of their group; it goes to
memory once a group, and whoever of the groups arrives last adds them in a fixed order. Programs of keys have tiles with
keys for rows: there the probabilities and their gradients are the left operands of their products as they are, and
never pass through shared memory. Together seven products where five would do, for no sum is shared between programs.
Two programs of keys take as long as each of queries: all walk over the same windows at once, so that what the second
one to come reads is in L2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.arrival import arrive
from .triton_fragments import (
    CHUNK,
    KEY_PROGRAMS,
    ROWS,
    at,
    bias_map,
    chunks,
    exact_where_clamped,
    key_order,
    load_fragment,
    load_rows,
    load_values,
    part_rows,
    row_inverse,
    row_order,
    starts,
    store_fragment,
    store_rows,
    thread_sums,
)
from .triton_gradient_tiles import through_norm
from .triton_tiles import LN2, LOG2E, MAX_LOGIT_SCALE, head_scale, image_start, token_rows


@triton.jit(do_not_specialize=["windows", "groups", "height", "width", "heads", "shift_y", "shift_x"])
def rows_backward_kernel(
    p_grad,  # (B, H, W, heads, D)
    p_qkv,  # (B, H, W, 3, heads, D)
    p_bias,  # (heads, 4 where SHIFTED else 1, N, N): see bias_tables
    p_turned,  # the same with keys for rows, float32
    p_scale,  # (heads,) or None
    p_out,  # (B, H, W, heads, D)
    p_lse,  # (B·windows, heads, N) float32
    p_dqkv,  # (B, H, W, 3, heads, D), out
    p_partial,  # (heads, groups, N, N) float32 scratch, or None when the bias needs no gradient
    p_dbias,  # (heads, N, N) float32, out, or None
    p_shares,  # (heads, groups, PARTS) float32 scratch: gradient of λ, or None
    p_dscale,  # (heads,) float32, out, or None
    p_count,  # (heads, PARTS + 1) int32 zeros, see common.arrival; None when neither is wanted
    p_rows,  # (heads, groups, KEY_PROGRAMS, 2, N) float32 scratch: a window's deltas and inverse norms of its queries
    windows, groups, height, width, heads, shift_y, shift_x,
    WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr,
):
    i_head, i_group, i_role = _place(0, heads, PARTS)
    image = (height, width, shift_y, shift_x)
    scale = head_scale(p_scale, i_head, D)
    place = (i_head, i_group, groups, windows, heads)
    # In the order of the machine code that AotCase.trips counts on.
    if i_role >= PARTS:
        _keys(p_grad, p_qkv, p_turned, p_out, p_lse, p_dqkv, p_rows, place, i_role - PARTS, scale, image,
              WH, WW, D, DP, SHIFTED, p_scale is not None, PARTS)
    else:
        _queries(p_grad, p_qkv, p_bias, p_out, p_lse, p_dqkv, p_partial, p_shares, place, i_role, scale, image,
                 WH, WW, D, DP, SHIFTED, p_scale is not None, PARTS)
        if p_count is not None:
            _finish(p_partial, p_dbias, p_shares, p_dscale, p_scale, p_count, windows, heads, groups, WH * WW, PARTS)


@triton.jit
def _place(zero, heads, PARTS: tl.constexpr):
    """(Head, group, role) of a program. A ``zero`` that the compiler does not know makes it compute them again.

    The roles of a head and group are neighbours: they start together.
    """
    roles: tl.constexpr = PARTS + KEY_PROGRAMS
    i_program = tl.program_id(0) + zero
    return i_program // roles % heads, i_program // roles // heads, i_program % roles


@triton.jit
def _late(zero, place, sizes, D: tl.constexpr):
    """(Head, heads, values of a token, sizes of the image), made anew with a ``zero`` as in :func:`_place`."""
    i_head, _, _, _, heads = place
    height, width, shift_y, shift_x = sizes
    image = (height + zero, width + zero, shift_y + zero, shift_x + zero)
    return i_head + zero, heads + zero, (heads + zero) * D, image


@triton.jit
def _queries(p_grad, p_qkv, p_bias, p_out, p_lse, p_dqkv, p_partial, p_shares, place, i_part, scale, sizes,
             WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SHIFTED: tl.constexpr,
             COSINE: tl.constexpr, PARTS: tl.constexpr):
    """dq and the bias gradient of a part of the rows, over all windows of the group."""
    N: tl.constexpr = WH * WW
    # With chunks of 32 keys Triton 3.6 spills.
    WIDTHS: tl.constexpr = chunks(N, 16)
    STARTS: tl.constexpr = starts(N, 16)
    _, i_group, groups, windows, _ = place
    i_first, i_end = part_rows(i_part, N, PARTS)
    dscale = 0.0
    dbias = ()
    for c in tl.static_range(len(WIDTHS)):
        dbias = dbias + (tl.zeros([ROWS, at(WIDTHS, c)], tl.float32),)
    for i_window in tl.range(i_group, windows, groups, num_stages=1, disable_licm=True):
        # 0, but not for the compiler: what is made with it is computed here and fills no registers of the loop.
        late = tl.minimum(i_window, 0)
        i_head, heads, stride, image = _late(late, place, sizes, D)
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
        factor = tl.zeros([ROWS], tl.float32) + scale * LOG2E
        if COSINE:
            factor *= row_inverse(q)
        dq = tl.zeros([ROWS, DP], tl.float32)
        sum_dss = tl.zeros([ROWS, 4], tl.float32)
        sum_ds = tl.zeros([ROWS, 4], tl.float32)
        sum_ps = tl.zeros([ROWS, 4], tl.float32)
        new = ()
        for c in tl.static_range(len(WIDTHS)):
            k, unit, v, key_scale = _chunk(p_q + stride, i_window, late + STARTS[c] + key_order(WIDTHS[c]), image,
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
        inverse = exact_where_clamped(row_inverse(q)) if COSINE else delta
        if COSINE:
            # Over all keys Σ ds would be 0 but for the rounding of the stored output in delta: this is free of it.
            share = tl.sum(sum_dss, 1) - tl.sum(sum_ds, 1) * tl.sum(sum_ps, 1)
            dscale += tl.sum(share * inverse * (scale * LOG2E), 0)
        dq = through_norm(dq, q.to(tl.float32) * inverse[:, None], inverse, scale, COSINE)
        store_rows(p_dqkv + first * (3 * stride) + i_head * D, dq, o_row, m_i, 3 * stride, D, DP)
    # Over the loop they would be three more registers than there are.
    i_head, i_group, i_part = _place(tl.minimum(windows, 0), place[4], PARTS)
    i_first, i_end = part_rows(i_part, N, PARTS)
    if COSINE:
        tl.store(p_shares + (i_head * groups + i_group) * PARTS + i_part, dscale * LN2)
    if p_partial is not None:
        p_sum = p_partial + (i_head * groups + i_group).to(tl.int64) * (N * N)
        for c in tl.static_range(len(WIDTHS)):
            store_fragment(p_sum, dbias[c], i_first, i_end, STARTS[c], N, WIDTHS[c])


@triton.jit
def _chunk(p_k, i_window, o_j, image, stride, WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
           COSINE: tl.constexpr, FULL: tl.constexpr):
    """(k, unit k, v, inverse norm) of a chunk of keys."""
    o_row = token_rows(i_window, o_j, image, WH, WW)
    m_j = None if FULL else o_j < WH * WW
    k = load_rows(p_k, o_row, m_j, 3 * stride, D, DP)
    v = load_rows(p_k + stride, o_row, m_j, 3 * stride, D, DP)
    if COSINE:
        inverse = row_inverse(k)
        return k, (k.to(tl.float32) * inverse[:, None]).to(k.dtype), v, inverse
    else:
        return k, k, v, tl.zeros(o_j.shape, tl.float32)


@triton.jit
def _finish(p_partial, p_dbias, p_shares, p_dscale, p_scale, p_count, windows, heads, groups, N: tl.constexpr,
            PARTS: tl.constexpr):
    """The last group of a part adds its rows of the bias gradient up, the last part of a head the shares of λ."""
    i_head, _, i_part = _place(tl.minimum(windows, 0), heads, PARTS)
    p_counts = p_count + i_head * (PARTS + 1)
    if arrive(p_counts + 1 + i_part, groups):
        if p_partial is not None:
            i_first, i_end = part_rows(i_part, N, PARTS)
            _sum_groups(p_partial + (i_head * groups).to(tl.int64) * (N * N), p_dbias + i_head.to(tl.int64) * (N * N),
                        i_first * N, i_end * N, groups, N * N)
        if p_shares is not None:  # noqa: SIM102 - decided when compiled, the inner one at run time
            if arrive(p_counts, PARTS):
                total = tl.zeros([64], tl.float32)
                for first in tl.range(0, groups * PARTS, 64):
                    o = first + tl.arange(0, 64)
                    p_share = p_shares + i_head * groups * PARTS + o
                    total += tl.load(p_share, mask=o < groups * PARTS, other=0.0, cache_modifier=".cg")
                clamped = tl.load(p_scale + i_head).to(tl.float32) > MAX_LOGIT_SCALE
                tl.store(p_dscale + i_head, tl.where(clamped, 0.0, tl.sum(total, 0)))


@triton.jit
def _sum_groups(p_sums, p_out, first, end, groups, SIZE: tl.constexpr):
    """Values [first, end) of the sum of ``groups`` maps, 16 of them at a time: one alone would wait for each load."""
    for start in tl.range(first, end, 512):
        o = start + tl.arange(0, 512)
        total = tl.zeros([512], tl.float32)
        for g in tl.range(0, groups, 16):
            o_g = g + tl.arange(0, 16)
            # Other processors wrote these: past the cache of this one.
            total += tl.sum(tl.load(p_sums + o_g.to(tl.int64)[:, None] * SIZE + o[None, :],
                                    mask=(o_g < groups)[:, None] & (o < end)[None, :], other=0.0,
                                    cache_modifier=".cg"), 0)
        tl.store(p_out + o, total, mask=o < end)


@triton.jit
def _keys(p_grad, p_qkv, p_turned, p_out, p_lse, p_dqkv, p_rows, place, i_part, scale, image,
          WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SHIFTED: tl.constexpr,
          COSINE: tl.constexpr, PARTS: tl.constexpr):
    """dk and dv of every KEY_PROGRAMS-th window of the group."""
    N: tl.constexpr = WH * WW
    WIDTHS: tl.constexpr = chunks(N, CHUNK)
    STARTS: tl.constexpr = starts(N, CHUNK)
    i_head, i_group, groups, windows, heads = place
    stride = heads * D
    p_delta = p_rows + ((i_head * groups + i_group) * KEY_PROGRAMS + i_part).to(tl.int64) * (2 * N)
    for i_window in tl.range(i_group + groups * i_part, windows, groups * KEY_PROGRAMS, num_stages=1,
                             disable_licm=True):
        late = tl.minimum(i_window, 0)
        first = image_start(i_window, image, WH, WW)
        p_q = p_qkv + first * (3 * stride) + i_head * D
        o_head = first * stride + i_head * D
        o_lse = (i_window * heads + i_head).to(tl.int64) * N
        p_map = bias_map(p_turned, i_head, i_window, image, WH, WW, SHIFTED)
        queries = ()
        for c in tl.static_range(len(WIDTHS)):
            o_i = late + STARTS[c] + key_order(WIDTHS[c])
            o_row = token_rows(i_window, o_i, image, WH, WW)
            m_i = None if STARTS[c] + WIDTHS[c] <= N else o_i < N
            q = load_rows(p_q, o_row, m_i, 3 * stride, D, DP)
            grad = load_rows(p_grad + o_head, o_row, m_i, stride, D, DP)
            out = load_rows(p_out + o_head, o_row, m_i, stride, D, DP)
            tl.store(p_delta + o_i, tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1), mask=m_i)
            unit = q
            if COSINE:
                norm = row_inverse(q)
                tl.store(p_delta + N + o_i, norm, mask=m_i)
                unit = (q.to(tl.float32) * norm[:, None]).to(q.dtype)
            queries = queries + ((q, unit, grad),)
        # Other threads read what these have stored.
        tl.debug_barrier()
        for t in tl.range(0, PARTS, num_stages=1, disable_licm=True):
            i_first, i_end = part_rows(late + t, N, PARTS)
            o_j = i_first + row_order()
            m_j = o_j < i_end
            o_key = token_rows(i_window, o_j, image, WH, WW)
            k = load_rows(p_q + stride, o_key, m_j, 3 * stride, D, DP)
            v = load_rows(p_q + 2 * stride, o_key, m_j, 3 * stride, D, DP)
            inverse = row_inverse(k) if COSINE else tl.full([ROWS], 1.0, tl.float32)
            dk = tl.zeros([ROWS, DP], tl.float32)
            dv = tl.zeros([ROWS, DP], tl.float32)
            for c in tl.static_range(len(WIDTHS)):
                q, unit, grad = queries[c]
                # Their three values are read again, from L1: for all queries they would fill the registers.
                o_i = tl.minimum(t, 0) + STARTS[c] + key_order(WIDTHS[c])
                bias = load_fragment(p_map, i_first, i_end, STARTS[c], N, WIDTHS[c])
                lse = load_values(p_lse + o_lse, o_i, N, STARTS[c] + WIDTHS[c] <= N)
                delta = load_values(p_delta, o_i, N, STARTS[c] + WIDTHS[c] <= N)
                s = tl.dot(k, tl.trans(q))
                if COSINE:
                    s *= load_values(p_delta + N, o_i, N, STARTS[c] + WIDTHS[c] <= N)[None, :]
                p = tl.exp2(s * (inverse * (scale * LOG2E))[:, None] + (bias * LOG2E - lse[None, :]))
                dv = tl.dot(p.to(k.dtype), grad, dv)
                ds = p * (tl.dot(v, tl.trans(grad)) - delta[None, :])
                dk = tl.dot(ds.to(k.dtype), unit, dk)
            inverse = exact_where_clamped(inverse)
            dk = through_norm(dk, k.to(tl.float32) * inverse[:, None], inverse, scale, COSINE)
            p_dk = p_dqkv + image_start(i_window, image, WH, WW) * (3 * stride) + i_head * D + stride
            store_rows(p_dk, dk, o_key, m_j, 3 * stride, D, DP)
            store_rows(p_dk + stride, dv, o_key, m_j, 3 * stride, D, DP)
        # The next window's deltas come into the same place.
        tl.debug_barrier()
