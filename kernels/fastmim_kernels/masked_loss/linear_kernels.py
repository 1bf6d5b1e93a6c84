"""A linear head with its masked loss: the prediction lives in registers only.

The tokens are ordered on the device, those with masked pixels first, and their number stays there: a program
whose rows lie beyond it returns at once, so nothing waits for the host. Of each chunk of rows three kernels
make the loss and the slope l'(x̂ − x)·m, then the gradients of tokens and head. Sums over all programs are
made, in a fixed order, by those that arrive last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.arrival import arrive
from .on_triton import loss_of, slope_of


@triton.jit(do_not_specialize=["tokens", "grid_h", "grid_w", "zeros"])
def order_kernel(
    p_mask,  # (B, Hm, Wm) bool as uint8
    p_hit,  # (M,) uint8, scratch: whether a token has masked pixels
    p_order,  # (M,) int32, out: tokens, those with masked pixels first
    p_hits,  # scalar int32, out: number of those
    p_counter,  # int32, see .arrival
    p_zeros,  # (zeros,) int32, out: the counters of head_loss_kernel
    tokens, grid_h, grid_w, mask_h, mask_w, zeros,
    S: tl.constexpr, CELL_H: tl.constexpr, CELL_W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    BLOCK: tl.constexpr, SCAN: tl.constexpr,
):
    """A program looks at the cells of ``BLOCK`` tokens; the last one to arrive gives all tokens their places."""
    o_c = tl.arange(0, COLS)
    i_token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_token = i_token < tokens
    i_y = i_token // grid_w % grid_h * S
    i_x = i_token % grid_w * S
    # Cells from the one of the token's first pixel on that begin before its end.
    o_col = (i_x // CELL_W)[:, None] + o_c[None, :]
    m_col = m_token[:, None] & (o_col * CELL_W < (i_x + S)[:, None]) & (o_col < mask_w)
    o_image = i_token // grid_w // grid_h * mask_h
    b_mask = tl.zeros((BLOCK, COLS), tl.uint8)
    for r in tl.static_range(ROWS):
        o_row = i_y // CELL_H + r
        m_row = (o_row * CELL_H < i_y + S) & (o_row < mask_h)
        o_line = ((o_image + o_row) * mask_w)[:, None]
        b_mask |= tl.load(p_mask + o_line + o_col, mask=m_col & m_row[:, None], other=0)
    tl.store(p_hit + i_token, (tl.max(b_mask.to(tl.int32), 1) != 0).to(tl.uint8), mask=m_token)
    if arrive(p_counter, tl.num_programs(0)):
        o = tl.arange(0, SCAN)
        for i in range(0, zeros, SCAN):
            tl.store(p_zeros + i + o, tl.zeros((SCAN,), tl.int32), mask=i + o < zeros)
        hits = 0
        for i in range(0, tokens, SCAN):
            b_hit = tl.load(p_hit + i + o, mask=i + o < tokens, other=0, cache_modifier=".cg").to(tl.int32)
            o_hit = tl.cumsum(b_hit, 0) - b_hit + hits
            # The others fill the end backwards.
            o_order = tl.where(b_hit != 0, o_hit, tokens - 1 - i - o + o_hit)
            tl.store(p_order + o_order, i + o, mask=i + o < tokens)
            hits += tl.sum(b_hit, 0)
        tl.store(p_hits, hits)


@triton.jit(do_not_specialize=["grid_h", "grid_w"])
def statistics_kernel(
    p_target,  # (B, C, H, W) float32 or uint8
    p_mean,  # (C,) or None
    p_std,  # (C,) or None
    p_order,  # (M,) int32 tokens, those with masked pixels first
    p_hits,  # scalar int32, number of tokens with masked pixels
    p_stats,  # (M, 2) float32, out: mean and 1 / deviation of the pixels of those tokens
    grid_h, grid_w, height, width, K, eps,
    S: tl.constexpr, BLOCK: tl.constexpr,
):
    """A program has a token, whose means and sums of squares of ``BLOCK`` values are merged (Chan et al. 1983)."""
    if tl.program_id(0) < tl.load(p_hits):
        i_token = tl.load(p_order + tl.program_id(0))
        i_y, i_x = i_token // grid_w % grid_h * S, i_token % grid_w * S
        o_image = (i_token // (grid_w * grid_h)).to(tl.int64) * (K // (S * S)) * height * width + (i_y * width + i_x)
        a_mean = 0.0
        a_square = 0.0
        for k in range(0, K, BLOCK):
            o_k = k + tl.arange(0, BLOCK)
            m_k = o_k < K
            i_c = o_k // (S * S)
            o_pixel = (i_c * height + o_k // S % S) * width + o_k % S
            b_t = tl.load(p_target + o_image + o_pixel, mask=m_k, other=0).to(tl.float32)
            if p_mean is not None:
                b_std = tl.load(p_std + i_c, mask=m_k, other=1)
                b_t = b_t * (1 / (255 * b_std)) - tl.load(p_mean + i_c, mask=m_k, other=0) / b_std
            count = tl.minimum(K - k, BLOCK).to(tl.float32)
            b_mean = tl.sum(tl.where(m_k, b_t, 0.0), 0) / count
            b_d = tl.where(m_k, b_t - b_mean, 0.0)
            step = b_mean - a_mean
            share = count / (k + count)
            a_mean += step * share
            a_square += tl.sum(b_d * b_d, 0) + step * step * k * share
        tl.store(p_stats + 2 * i_token, a_mean)
        tl.store(p_stats + 2 * i_token + 1, 1 / tl.sqrt_rn(a_square / (K - 1) + eps))


@triton.jit(do_not_specialize=["first", "row_blocks", "grid_h", "grid_w"])
def head_loss_kernel(
    p_x,  # (M, D) tokens
    p_w,  # (K, D) head, K = C·S²
    p_bias,  # (K,) or None
    p_target,  # (B, C, H, W) float32 or uint8
    p_mask,  # (B, Hm, Wm) bool as uint8
    p_mean,  # (C,) or None
    p_std,  # (C,) or None
    p_stats,  # (M, 2) float32 mean and 1 / deviation of each token's pixels, or None
    p_order,  # (M,) int32 tokens, those with masked pixels first
    p_hits,  # scalar int32, number of tokens with masked pixels
    p_slope,  # (rows of the chunk, K) or None
    p_sum,  # (2, row blocks of all chunks, column blocks) float32, scratch: loss sums, masked pixels
    p_dbias,  # (row blocks of all chunks, K) float32 or None, scratch
    p_counter,  # (1 + column blocks,) int32, zero before the first chunk; every chunk adds
    p_loss,  # scalar float32, out
    p_scale,  # scalar float32, out: 1 / (masked pixels + EPS) / C
    p_bias_grad,  # (K,) float32 or None, out
    first, row_blocks, grid_h, grid_w, height, width, mask_h, mask_w, D, K,
    S: tl.constexpr, CELL_H: tl.constexpr, CELL_W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    LOSS: tl.constexpr, PRECISION: tl.constexpr, EPS: tl.constexpr,
):
    # Tokens, mask and one image have less than 2³¹ values each, which the launcher has checked.
    i_m = tl.program_id(0)
    i_n = tl.program_id(1)
    hits = tl.load(p_hits)
    i_row = i_m * BM + tl.arange(0, BM)
    m_row = first + i_row < hits
    o_n = i_n * BN + tl.arange(0, BN)
    m_n = o_n < K
    a_loss = 0.0
    a_pixels = 0.0
    a_bias = tl.zeros((BN,), tl.float32)
    if first + i_m * BM < hits:
        i_token = tl.load(p_order + first + i_row, mask=m_row, other=0)
        acc = tl.zeros((BM, BN), tl.float32)
        p_xs = p_x + i_token.to(tl.int64)[:, None] * D
        p_ws = p_w + o_n.to(tl.int64)[:, None] * D
        for k in range(0, D, BK):
            o_k = (k + tl.arange(0, BK))[None, :]
            b_x = tl.load(p_xs + o_k, mask=m_row[:, None] & (o_k < D), other=0)
            b_w = tl.load(p_ws + o_k, mask=m_n[:, None] & (o_k < D), other=0)
            acc = tl.dot(b_x, tl.trans(b_w.to(b_x.dtype)), acc, input_precision=PRECISION)
        if p_bias is not None:
            acc += tl.load(p_bias + o_n, mask=m_n, other=0).to(tl.float32)[None, :]
        # Pixel of value n of the token: channel n // S², row n // S % S, column n % S.
        i_c, o_y, o_x = o_n // (S * S), o_n // S % S, o_n % S
        i_b, i_line, i_column = i_token // (grid_w * grid_h), i_token // grid_w % grid_h, i_token % grid_w
        i_y = (i_line * S)[:, None] + o_y[None, :]
        i_x = (i_column * S)[:, None] + o_x[None, :]
        m_in = m_row[:, None] & m_n[None, :] & (i_y < height) & (i_x < width)
        if S % CELL_H == 0 and S % CELL_W == 0:
            o_first = (i_b * mask_h + i_line * (S // CELL_H)) * mask_w + i_column * (S // CELL_W)
            o_cell = o_first[:, None] + (o_y // CELL_H * mask_w + o_x // CELL_W)[None, :]
        else:
            o_cell = (i_b * mask_h)[:, None] * mask_w + i_y // CELL_H * mask_w + i_x // CELL_W
        m_hit = tl.load(p_mask + o_cell, mask=m_in, other=0) != 0
        o_image = i_b.to(tl.int64) * (K // (S * S)) * height * width + (i_line * S * width + i_column * S)
        o_pixel = (i_c * height + o_y) * width + o_x
        b_t = tl.load(p_target + o_image[:, None] + o_pixel[None, :], mask=m_in, other=0).to(tl.float32)
        if p_mean is not None:
            b_std = tl.load(p_std + i_c, mask=m_n, other=1)
            b_mean = tl.load(p_mean + i_c, mask=m_n, other=0)
            b_t = b_t * (1 / (255 * b_std))[None, :] - (b_mean / b_std)[None, :]
        if p_stats is not None:
            b_t -= tl.load(p_stats + 2 * i_token, mask=m_row, other=0)[:, None]
            b_t *= tl.load(p_stats + 2 * i_token + 1, mask=m_row, other=0)[:, None]
        b_d = tl.where(m_hit, acc - b_t, 0.0)
        # Not axis after axis: of a product's tile on sm_100 that ends in an assertion of Triton 3.6.
        a_loss = tl.sum(loss_of(b_d, LOSS))
        a_pixels = tl.sum((m_hit & (i_c == 0)[None, :]).to(tl.float32))
        if p_slope is not None:
            b_slope = slope_of(b_d, LOSS)
            a_bias = tl.sum(b_slope, 0)
            o_slope = i_row[:, None] * K + o_n[None, :]
            tl.store(p_slope + o_slope, b_slope.to(p_slope.dtype.element_ty), mask=m_row[:, None] & m_n[None, :])
    i_block = (first // BM + i_m).to(tl.int64)
    columns = tl.num_programs(1)
    tl.store(p_sum + i_block * columns + i_n, a_loss)
    tl.store(p_sum + (row_blocks + i_block) * columns + i_n, a_pixels)
    if p_dbias is not None:
        tl.store(p_dbias + i_block * K + o_n, a_bias, mask=m_n)
    _last_sums(p_sum, p_dbias, p_counter, p_loss, p_scale, p_bias_grad, i_n, row_blocks, columns, K, S, BN, EPS)


@triton.jit
def _last_sums(p_sum, p_dbias, p_counter, p_loss, p_scale, p_bias_grad, i_n, row_blocks, columns, K,
               S: tl.constexpr, BN: tl.constexpr, EPS: tl.constexpr):
    """The last program of a block of columns adds its rows up, the last of those all columns."""
    if arrive(p_counter + 1 + i_n, row_blocks):
        o_n = i_n * BN + tl.arange(0, BN)
        a_loss = tl.zeros((32,), tl.float32)
        a_pixels = tl.zeros((32,), tl.float32)
        a_bias = tl.zeros((BN,), tl.float32)
        for r in range(0, row_blocks, 32):
            o_r = r + tl.arange(0, 32)
            m_r = o_r < row_blocks
            p_own = p_sum + o_r * columns + i_n
            a_loss += tl.load(p_own, mask=m_r, other=0, cache_modifier=".cg")
            a_pixels += tl.load(p_own + row_blocks * columns, mask=m_r, other=0, cache_modifier=".cg")
            if p_dbias is not None:
                m = m_r[:, None] & (o_n < K)[None, :]
                p_rows = p_dbias + o_r.to(tl.int64)[:, None] * K + o_n[None, :]
                a_bias += tl.sum(tl.load(p_rows, mask=m, other=0, cache_modifier=".cg"), 0)
        if p_dbias is not None:
            tl.store(p_bias_grad + o_n, a_bias, mask=o_n < K)
        # Rows of the first block hold the sums of their column from here on.
        tl.store(p_sum + i_n, tl.sum(a_loss, 0))
        tl.store(p_sum + row_blocks * columns + i_n, tl.sum(a_pixels, 0))
        if arrive(p_counter, columns):
            a_loss = tl.zeros((32,), tl.float32)
            a_pixels = tl.zeros((32,), tl.float32)
            for n in range(0, columns, 32):
                i_col = n + tl.arange(0, 32)
                a_loss += tl.load(p_sum + i_col, mask=i_col < columns, other=0, cache_modifier=".cg")
                p_all = p_sum + row_blocks * columns + i_col
                a_pixels += tl.load(p_all, mask=i_col < columns, other=0, cache_modifier=".cg")
            scale = 1 / (tl.sum(a_pixels, 0) + EPS) / (K // (S * S))
            tl.store(p_scale, scale)
            tl.store(p_loss, tl.sum(a_loss, 0) * scale)


@triton.jit(do_not_specialize=["first", "last"])
def token_gradient_kernel(
    p_slope,  # (rows of the chunk, K)
    p_w,  # (K, D) head
    p_order,  # (M,) int32
    p_hits,  # scalar int32
    p_dx,  # (M, D) gradient of the tokens; zero where nothing is masked
    first, last, D, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):
    i_m = tl.program_id(0)
    i_row = i_m * BM + tl.arange(0, BM)
    m_row = first + i_row < last
    hits = tl.load(p_hits)
    m_hit = m_row & (first + i_row < hits)
    o_d = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    m_d = o_d < D
    i_token = tl.load(p_order + first + i_row, mask=m_row, other=0).to(tl.int64)
    acc = tl.zeros((BM, BN), tl.float32)
    if first + i_m * BM < hits:
        for k in range(0, K, BK):
            o_k = k + tl.arange(0, BK)
            m_k = o_k < K
            b_s = tl.load(p_slope + i_row[:, None] * K + o_k[None, :], mask=m_hit[:, None] & m_k[None, :], other=0)
            b_w = tl.load(p_w + o_k[:, None] * D + o_d[None, :], mask=m_k[:, None] & m_d[None, :], other=0)
            acc = tl.dot(b_s, b_w.to(b_s.dtype), acc, input_precision=PRECISION)
    tl.store(p_dx + i_token[:, None] * D + o_d[None, :], acc.to(p_dx.dtype.element_ty),
             mask=m_row[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=["first", "last"])
def weight_gradient_kernel(
    p_slope,  # (rows of the chunk, K)
    p_x,  # (M, D) tokens
    p_order,  # (M,) int32
    p_hits,  # scalar int32
    p_dw,  # (K, D) float32, sum over chunks
    first, last, D, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_d = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < K
    m_d = o_d < D
    rows = tl.minimum(tl.load(p_hits), last) - first
    acc = tl.zeros((BM, BN), tl.float32)
    for r in range(0, rows, BK):
        i_row = r + tl.arange(0, BK)
        m_row = i_row < rows
        i_token = tl.load(p_order + first + i_row, mask=m_row, other=0).to(tl.int64)
        b_s = tl.load(p_slope + i_row[:, None].to(tl.int64) * K + o_n[None, :], mask=m_row[:, None] & m_n[None, :],
                      other=0)
        b_x = tl.load(p_x + i_token[:, None] * D + o_d[None, :], mask=m_row[:, None] & m_d[None, :], other=0)
        acc = tl.dot(tl.trans(b_s), b_x, acc, input_precision=PRECISION)
    p_out = p_dw + o_n[:, None] * D + o_d[None, :]
    m_out = m_n[:, None] & m_d[None, :]
    if ADD:
        acc += tl.load(p_out, mask=m_out, other=0)
    tl.store(p_out, acc, mask=m_out)


@triton.jit
def scale_kernel(
    p_grad,  # scalar: gradient of the loss
    p_scale,  # scalar float32
    p_tokens, p_weight, p_bias,  # gradients over both factors; p_bias may be None
    p_tokens_out, p_weight_out, p_bias_out,  # out: the gradients
    tokens, weights, biases,  # values
    BLOCK: tl.constexpr,
):
    b_factor = tl.load(p_grad).to(tl.float32) * tl.load(p_scale)
    i_block = tl.program_id(0).to(tl.int64)
    first = tl.cdiv(tokens, BLOCK)
    second = first + tl.cdiv(weights, BLOCK)
    if i_block < first:
        _scale(p_tokens, p_tokens_out, i_block, tokens, b_factor, BLOCK)
    elif i_block < second:
        _scale(p_weight, p_weight_out, i_block - first, weights, b_factor, BLOCK)
    elif p_bias is not None:
        _scale(p_bias, p_bias_out, i_block - second, biases, b_factor, BLOCK)


@triton.jit
def _scale(p_in, p_out, i_block, count, b_factor, BLOCK: tl.constexpr):
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_in + o, mask=o < count, other=0).to(tl.float32) * b_factor
    tl.store(p_out + o, b_x.to(p_out.dtype.element_ty), mask=o < count)
