"""Shifted-window attention, forward, for windows of 65 to 144 tokens: whole rows of logits in registers.

A program keeps one head and walks over a group of windows. Each window's keys are read and normalised once; its
queries follow 64 at a time, and since a row of logits is whole, each is exponentiated once and nothing is rescaled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_fragments import (
    CHUNK,
    ROWS,
    chunks,
    key_order,
    load_fragment,
    load_rows,
    part_rows,
    row_inverse,
    row_order,
    starts,
    store_rows,
)
from .triton_tiles import (
    LN2,
    LOG2E,
    MASKED_LOGIT,
    head_scale,
    image_start,
    token_rows,
    token_sides,
    window_seams,
)


@triton.jit(do_not_specialize=["windows", "groups", "height", "width", "heads", "shift_y", "shift_x"])
def rows_forward_kernel(
    p_qkv,  # (B, H, W, 3, heads, D)
    p_bias,  # (heads, N, N)
    p_scale,  # (heads,) or None
    p_out,  # (B, H, W, heads, D)
    p_lse,  # (B·windows, heads, N) float32, base 2
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
    p_bias += i_head.to(tl.int64) * (N * N)
    scale = head_scale(p_scale, i_head, D)
    for i_window in tl.range(i_group, windows, groups, num_stages=1, disable_licm=True):
        # 0, but not for the compiler: offsets made with it are computed here and fill no registers of the loop.
        late = tl.minimum(i_window, 0)
        first = image_start(i_window, image, WH, WW)
        p_q = p_qkv + first * (3 * stride) + i_head * D
        p_o = p_out + first * stride + i_head * D
        p_l = p_lse + (i_window * heads + i_head).to(tl.int64) * N
        seams = window_seams(i_window, image, WH, WW)
        keys = ()
        for c in tl.static_range(len(WIDTHS)):
            o_j = late + STARTS[c] + key_order(WIDTHS[c])
            m_j = None if STARTS[c] + WIDTHS[c] <= N else o_j < N
            o_key = token_rows(i_window, o_j, image, WH, WW)
            k = load_rows(p_q + stride, o_key, m_j, 3 * stride, D, DP)
            v = load_rows(p_q + 2 * stride, o_key, m_j, 3 * stride, D, DP)
            keys = keys + ((k, v, row_inverse(k) if COSINE else tl.zeros([WIDTHS[c]], tl.float32)),)
        for t in tl.range(0, PARTS, num_stages=1):
            i_first, i_end = part_rows(late + t, N, PARTS)
            o_i = i_first + row_order()
            m_i = o_i < i_end
            o_row = token_rows(i_window, o_i, image, WH, WW)
            q = load_rows(p_q, o_row, m_i, 3 * stride, D, DP)
            factor = tl.zeros([ROWS], tl.float32) + scale
            if COSINE:
                factor *= row_inverse(q)
            logits = ()
            # Finite and at least 1, so that padded rows, all of whose logits are −inf, stay free of NaN.
            maximum = tl.full([ROWS], -1e30, tl.float32)
            for c in tl.static_range(len(WIDTHS)):
                bias = load_fragment(p_bias, i_first, i_end, STARTS[c], N, WIDTHS[c])
                if SHIFTED:
                    # Made anew for every tile of queries, and before the product: else they fill the registers.
                    side_i = token_sides(o_i, image, WH, WW) & seams
                    o_j = tl.minimum(t, 0) + STARTS[c] + key_order(WIDTHS[c])
                    side_j = token_sides(o_j, image, WH, WW) & seams
                    bias += tl.where(side_i[:, None] != side_j[None, :], MASKED_LOGIT * LN2, 0.0)
                # The norms scale the product, so that q and k enter it unrounded.
                s = tl.dot(q, tl.trans(keys[c][0]))
                if COSINE:
                    s *= keys[c][2][None, :]
                s = s * factor[:, None] + bias
                logits = logits + (s,)
                maximum = tl.maximum(maximum, tl.max(s, 1))
            maximum *= LOG2E
            sums = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, DP], tl.float32)
            for c in tl.static_range(len(WIDTHS)):
                p = tl.exp2(logits[c] * LOG2E - maximum[:, None])
                sums += tl.sum(p, 1)
                acc = tl.dot(p.to(q.dtype), keys[c][1], acc)
            sums = tl.maximum(sums, 1.0)
            store_rows(p_o, acc * (1 / sums)[:, None], o_row, m_i, stride, D, DP)
            tl.store(p_l + o_i, maximum + tl.log2(sums), mask=m_i)
