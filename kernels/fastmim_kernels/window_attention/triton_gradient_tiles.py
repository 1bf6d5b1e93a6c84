"""Pieces of the backward window-attention kernels: the two sides of a tile, its gradients, their stores."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import LOG2E, biased, inverse_norm, load_tile, norm_counts, store_tile, token_rows, token_sides


@triton.jit
def query_side(pointers, i_window, o_i, image, stride, scale, WH: tl.constexpr, WW: tl.constexpr,
               D: tl.constexpr, DP: tl.constexpr, COSINE: tl.constexpr, FULL: tl.constexpr, WHOLE: tl.constexpr):
    """What the gradient needs of a tile of queries; padded rows get a huge lse, hence probability 0.

    delta is Σ p·dp of a row: from the stored output, or, where a chunk holds the WHOLE row of keys, left to
    :func:`logit_gradient`, which then needs no output.
    """
    p_q, p_out, p_grad, p_lse = pointers
    N: tl.constexpr = WH * WW
    o_row = token_rows(i_window, o_i, image, WH, WW)
    side = token_sides(o_i, image, WH, WW)
    q = load_tile(p_q, o_row, 3 * stride, o_i, N, D, DP, FULL)
    grad = load_tile(p_grad, o_row, stride, o_i, N, D, DP, FULL)
    lse = tl.load(p_lse + o_i) if FULL else tl.load(p_lse + o_i, mask=o_i < N, other=1e30)
    delta = lse
    if not WHOLE:
        out = load_tile(p_out, o_row, stride, o_i, N, D, DP, FULL)
        delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    if COSINE:
        inverse = inverse_norm(q)
        unit = (q.to(tl.float32) * inverse[:, None]).to(q.dtype)
        return q, unit, grad, delta, lse, inverse * (scale * LOG2E), side, o_row, inverse
    else:
        return q, q, grad, delta, lse, tl.zeros_like(lse) + scale * LOG2E, side, o_row, lse


@triton.jit
def key_side(p_k, i_window, o_j, image, stride, WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr,
              DP: tl.constexpr, COSINE: tl.constexpr, FULL: tl.constexpr):
    o_row = token_rows(i_window, o_j, image, WH, WW)
    side = token_sides(o_j, image, WH, WW)
    k = load_tile(p_k, o_row, 3 * stride, o_j, WH * WW, D, DP, FULL)
    v = load_tile(p_k + stride, o_row, 3 * stride, o_j, WH * WW, D, DP, FULL)
    if COSINE:
        inverse = inverse_norm(k)
        return k, (k.to(tl.float32) * inverse[:, None]).to(k.dtype), v, inverse, side, o_row
    else:
        return k, k, v, side, side, o_row


@triton.jit
def logit_gradient(query, key, seams, bias, COSINE: tl.constexpr, SHIFTED: tl.constexpr,
                   PRECISION: tl.constexpr, WHOLE: tl.constexpr):
    """(probabilities, gradient of the logits, sums for the gradient of λ), float32.

    The sums of a row, over these keys, are Σ ds·s, Σ ds and Σ p·s. Over all keys Σ ds would be 0 but for the
    rounding of the stored output in delta; the first less the product of the others is free of it.
    """
    q, _, grad, delta, lse, factor, side_i, _, _ = query
    k, _, v, key_scale, side_j, _ = key
    # The norms scale the product, so that q and k enter it unrounded.
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor[:, None]
    if COSINE:
        s *= key_scale[None, :]
    p = tl.exp2(biased(s, bias, side_i, side_j, seams, SHIFTED) - lse[:, None])
    dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    if WHOLE:
        delta = tl.sum(p * dp, 1)
    ds = p * (dp - delta[:, None])
    if COSINE:
        return p, ds, (tl.sum(ds * s, 1), tl.sum(ds, 1), tl.sum(p * s, 1))
    else:
        return p, ds, (delta, delta, delta)


@triton.jit
def through_norm(gradient, unit, inverse, scale, COSINE: tl.constexpr):
    """Gradient of x from that of scale·x/max(‖x‖, ε).

    ``unit`` is the rounded unit vector of the products: a float32 one would stay in registers all the while.
    """
    gradient *= scale
    if COSINE:
        radial = tl.where(norm_counts(inverse), tl.sum(unit.to(tl.float32) * gradient, 1), 0.0)
        gradient = (gradient - unit.to(tl.float32) * radial[:, None]) * inverse[:, None]
    return gradient


@triton.jit
def store_queries(p_q, p_dq, query, dq, o_i, stride, scale, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                  COSINE: tl.constexpr, FULL: tl.constexpr, RELOAD: tl.constexpr):
    """Stores dq through the norm; RELOAD reads q for it again, from L2, rather than keep it in registers."""
    unit = query[1]
    inverse = query[8]
    if RELOAD and COSINE:
        q = load_tile(p_q, query[7], 3 * stride, o_i, N, D, DP, FULL)
        inverse = inverse_norm(q)
        unit = (q.to(tl.float32) * inverse[:, None]).to(q.dtype)
    store_tile(p_dq, through_norm(dq, unit, inverse, scale, COSINE), query[7], 3 * stride, o_i, N, D, DP, FULL)


@triton.jit
def store_keys(p_dk, key, dk, dv, o_j, stride, scale, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                COSINE: tl.constexpr, FULL: tl.constexpr):
    store_tile(p_dk, through_norm(dk, key[1], key[3], scale, COSINE), key[5], 3 * stride, o_j, N, D, DP, FULL)
    store_tile(p_dk + stride, dv, key[5], 3 * stride, o_j, N, D, DP, FULL)


@triton.jit
def store_bias(p_partial, tile, o_i, o_j, N: tl.constexpr, FULL: tl.constexpr):
    p_tile = p_partial + o_i[:, None] * N + o_j[None, :]
    if FULL:
        tl.store(p_tile, tile)
    else:
        tl.store(p_tile, tile, mask=(o_i < N)[:, None] & (o_j < N)[None, :])


@triton.jit
def add_bias(p_sum, tile, o_i, o_j, later, N: tl.constexpr, FULL: tl.constexpr):
    """Adds a tile to the program's own sum in global memory; only stores it unless ``later``."""
    p_tile = p_sum + o_i[:, None] * N + o_j[None, :]
    m_old = (tl.where(later, o_i, N) < N)[:, None]
    if FULL:
        tl.store(p_tile, tile + tl.load(p_tile, mask=m_old, other=0.0))
    else:
        m_j = (o_j < N)[None, :]
        tl.store(p_tile, tile + tl.load(p_tile, mask=m_old & m_j, other=0.0), mask=(o_i < N)[:, None] & m_j)


@triton.jit
def add_shares(shares, share, COSINE: tl.constexpr):
    """Running sums of :func:`logit_gradient`, a triple a tile of queries."""
    if COSINE:
        return shares[0] + share[0], shares[1] + share[1], shares[2] + share[2]
    else:
        return shares
