"""A linear head with its masked loss: the prediction lives in registers only.

The tokens are ordered on the device, those with masked pixels first, and their number stays there: a program
whose rows lie beyond it returns at once, so nothing waits for the host. Of each chunk of rows three kernels
make the loss and the slope l'(x̂ − x)·m, then the gradients of tokens and head. Sums over all programs are
made, in a fixed order, by those that arrive last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import arrival
from ..common.aot_case import AotCase, in_dtype
from ..common.arrival import arrive
from ..common.matmul import precision
from ..common.sizes import cdiv, next_power_of_2
from ..common.token_layout import EPS
from .on_triton import _flat, loss_of, slope_of


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


def config(dtype: torch.dtype) -> dict[str, dict[str, int]]:
    """Tiles of the three products."""
    deep = 32 if dtype == torch.float32 else 64
    return {"loss": {"BM": 64, "BN": 64, "BK": deep, "num_warps": 4, "num_stages": 3},
            "tokens": {"BM": 64, "BN": 64, "BK": deep, "num_warps": 4, "num_stages": 3},
            "weight": {"BM": 64, "BN": 64, "BK": deep, "num_warps": 4, "num_stages": 3}}


STATISTICS = 1024
"""Pixels of a token whose mean and variance are taken at a time."""
SCAN = 4096
"""Tokens that get their places at a time."""
SLOPE_BYTES = 32 << 20
"""Most memory for the slope of a chunk, which lives from one kernel to the next two."""


def chunk_rows(tokens: int, row_bytes: int) -> int:
    """Rows whose slope exists at a time, in whole tiles."""
    return max(64, min(SLOPE_BYTES // row_bytes, tokens + 63) // 64 * 64)


def forward(tokens: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, mask: Tensor, mean: Tensor | None,
            std: Tensor | None, stride: int, loss: str, target_eps: float, count_eps: float, dtype: torch.dtype,
            grads: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, scale, d tokens, d weight, d bias), the gradients without the scale and empty unless asked for."""
    # The head is cast tile by tile.
    x, head = tokens.flatten(0, 2).to(dtype).contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    target, cells = target.contiguous(), mask.view(torch.uint8).contiguous()
    (m, d), k, device = x.shape, weight.shape[0], tokens.device
    height, width = target.shape[2:]
    rows, cfg = chunk_rows(m, k * dtype.itemsize), config(dtype)
    assert max(target[0].numel(), rows * k) < 2**31, "offsets within an image and within a chunk's slope are int32"
    cell = height // mask.shape[1], width // mask.shape[2]
    grid = cdiv(rows, cfg["loss"]["BM"]), cdiv(k, cfg["loss"]["BN"])
    order, hits, count = ordered(cells, tokens.shape, cell, stride, 1 + grid[1])

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    slope = make(rows, k, dtype=dtype) if grads else None
    d_x = make(*tokens.shape, dtype=tokens.dtype) if grads else make(0, dtype=tokens.dtype)
    d_w = make(*weight.shape) if grads else make(0)
    d_bias = make(k) if grads and bias is not None else make(0)
    blocks = cdiv(m, rows) * grid[0]
    sums, biases = make(2, blocks, grid[1]), make(blocks, k) if d_bias.numel() else None
    value, scale = make(), make()
    sizes = (blocks, tokens.shape[1], tokens.shape[2], height, width, *mask.shape[1:], d, k)
    pixels = (target, _flat(mean), _flat(std))
    stats = make(m, 2) if target_eps else None
    if stats is not None:
        statistics_kernel.run(*pixels, order, hits, stats, *sizes[1:5], k, target_eps, S=stride, BLOCK=STATISTICS,
                              num_warps=4, grid=(m,), warmup=False)
    for first in range(0, m, rows):
        last = min(first + rows, m)
        head_loss_kernel.run(
            x, head, bias, target, cells, *pixels[1:], stats, order, hits, slope, sums, biases,
            count, value, scale, None if biases is None else d_bias, first, *sizes,
            S=stride, CELL_H=cell[0], CELL_W=cell[1], LOSS=loss, PRECISION=precision(dtype), EPS=count_eps,
            **cfg["loss"], grid=grid, warmup=False)
        if grads:
            _gradients(slope, x, head, order, hits, d_x, d_w, first, last, cfg)
    return value, scale, d_x, d_w, d_bias


def ordered(mask: Tensor, shape: Sequence[int], cell: tuple[int, int], stride: int, counters: int
            ) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, those with masked pixels first; how many those are; zeros) of a (B, Hm, Wm) mask, all int32.

    The last are ``counters`` of this forward alone: what is left in them when it fails between two chunks is
    nobody's, and they are made in the launch that is there anyway.
    """
    m, device = shape[0] * shape[1] * shape[2], mask.device
    assert max(m, mask.numel()) < 2**31 - 2**16, "offsets of tokens and cells are int32"
    order, hits, zeros = (torch.empty(size, dtype=torch.int32, device=device) for size in ((m,), (), (counters,)))
    # Where cells do not divide a token, one more can reach into it.
    reach = [next_power_of_2(cdiv(stride, c) + (stride % c != 0)) for c in cell]
    block = max(16, min(1024, 2048 // reach[1]))
    order_kernel.run(
        mask, torch.empty(m, dtype=torch.uint8, device=device), order, hits, arrival.counters(1, device), zeros,
        m, shape[1], shape[2], *mask.shape[1:], counters, S=stride, CELL_H=cell[0], CELL_W=cell[1], ROWS=reach[0],
        COLS=reach[1], BLOCK=block, SCAN=SCAN, num_warps=8, grid=(cdiv(m, block),), warmup=False)
    return order, hits, zeros


def backward(grad: Tensor, scale: Tensor, d_tokens: Tensor, d_weight: Tensor, d_bias: Tensor,
             weight_dtype: torch.dtype, bias_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The three gradients times ``grad``·``scale``."""
    given = d_tokens, d_weight, d_bias
    found = tuple(torch.empty_like(t, dtype=dtype)
                  for t, dtype in zip(given, (d_tokens.dtype, weight_dtype, bias_dtype), strict=True))
    grid = (sum(cdiv(t.numel(), 4096) for t in given),)
    biases = given[2] if d_bias.numel() else None, found[2] if d_bias.numel() else None
    scale_kernel.run(grad, scale, *given[:2], biases[0], *found[:2], biases[1], *(t.numel() for t in given),
                     BLOCK=4096, num_warps=8, grid=grid, warmup=False)
    return found  # type: ignore[return-value]


def _gradients(slope: Tensor | None, x: Tensor, head: Tensor, order: Tensor, hits: Tensor, d_x: Tensor, d_w: Tensor,
               first: int, last: int, cfg: dict[str, dict[str, int]]) -> None:
    (k, d), tiles, exactness = head.shape, cfg["tokens"], precision(x.dtype)
    grid = cdiv(last - first, tiles["BM"]), cdiv(d, tiles["BN"])
    token_gradient_kernel.run(slope, head, order, hits, d_x, first, last, d, k, PRECISION=exactness, **tiles,
                              grid=grid, warmup=False)
    tiles = cfg["weight"]
    grid = cdiv(k, tiles["BM"]), cdiv(d, tiles["BN"])
    weight_gradient_kernel.run(slope, x, order, hits, d_w, first, last, d, k, ADD=first > 0, PRECISION=exactness,
                               **tiles, grid=grid, warmup=False)


_TYPES = {"p_stats": "*fp32", "eps": "fp32",
          "p_x": "*bf16", "p_w": "*fp32", "p_bias": "*fp32", "p_target": "*fp32", "p_mask": "*u8", "p_hit": "*u8",
          "p_order": "*i32", "p_hits": "*i32", "p_zeros": "*i32", "p_slope": "*bf16", "p_sum": "*fp32",
          "p_dbias": "*fp32", "p_dx": "*bf16", "p_dw": "*fp32", "p_counter": "*i32", "p_loss": "*fp32",
          "p_scale": "*fp32", "p_bias_grad": "*fp32", "p_grad": "*fp32", "p_tokens": "*bf16", "p_weight": "*fp32",
          "p_tokens_out": "*bf16", "p_weight_out": "*fp32", "p_bias_out": "*fp32"}


def aot_cases() -> list[AotCase]:
    """Head of the Swin encoders (3,072 values a token); the widths are run-time arguments."""
    cfg, wide = config(torch.bfloat16), config(torch.float32)
    loss: dict[str, Any] = {"S": 32, "CELL_H": 4, "CELL_W": 4, "LOSS": "l1", "p_mean": None, "p_std": None,
                            "p_stats": None, "EPS": EPS}
    mae = {k: v for k, v in loss.items() if k != "p_stats"} | {"S": 16, "CELL_H": 16, "CELL_W": 16, "LOSS": "l2"}
    whole = _case("statistics", statistics_kernel, {"num_warps": 4, "num_stages": 2},
                  {"S": 16, "BLOCK": STATISTICS, "p_mean": None, "p_std": None})
    scaled = _case("scale", scale_kernel, {"num_warps": 8, "num_stages": 2}, {"BLOCK": 4096})
    place = _case("order", order_kernel, {"num_warps": 8, "num_stages": 2},
                  {"S": 32, "CELL_H": 4, "CELL_W": 4, "ROWS": 8, "COLS": 8, "BLOCK": 256, "SCAN": SCAN})
    # Bytes of the mask.
    place = dataclasses.replace(place, dot=False, wide_target=0.0)
    return [place, dataclasses.replace(scaled, dot=False, signature={**scaled.signature, "p_bias": "*fp32"}),
            dataclasses.replace(whole, dot=False, wide_target=0.0),
            _case("loss", head_loss_kernel, cfg["loss"], loss),
            _case("loss/mae", head_loss_kernel, cfg["loss"], mae),
            _case("tokens", token_gradient_kernel, cfg["tokens"], {}),
            _case("weight", weight_gradient_kernel, cfg["weight"], {"ADD": True}),
            *(_in_float32(_case(*given)) for given in (
                ("loss", head_loss_kernel, wide["loss"], loss), ("tokens", token_gradient_kernel, wide["tokens"], {}),
                ("weight", weight_gradient_kernel, wide["weight"], {"ADD": True})))]


def _in_float32(case: AotCase) -> AotCase:
    """Its products are exact by default, and then not on tensor cores."""
    return dataclasses.replace(in_dtype(case, "fp32"), dot=False)


def _case(name: str, kernel: Any, tiles: dict[str, int], constexprs: dict[str, Any]) -> AotCase:
    exact = {"PRECISION": "ieee"} if "PRECISION" in kernel.arg_names else {}
    constexprs = {**exact, **constexprs, **{k: v for k, v in tiles.items() if k.startswith("B")}}
    signature = {n: _TYPES.get(n, "i32") for n in kernel.arg_names if n not in constexprs}
    divisible = tuple(n for n in signature if n not in ("grid_h", "grid_w", "row_blocks", "zeros"))
    return AotCase(name, kernel, signature, constexprs, tiles["num_warps"], tiles["num_stages"], divisible,
                   quick=True, dot=True, others=("fp16",), trips=_TRIPS.get(kernel.fn.__name__))


# As if every token had masked pixels; the one program that gives the tokens their places stands for all.
_TRIPS: dict[str, Callable[[Mapping[str, Any]], tuple[float, ...]]] = {
    "order_kernel": lambda a: (a["zeros"] / a["SCAN"] / a["grid"][0], a["tokens"] / a["SCAN"] / a["grid"][0]),
    "statistics_kernel": lambda a: (a["K"] / a["BLOCK"],),
    "head_loss_kernel": lambda a: (a["D"] / a["BK"],),
    "token_gradient_kernel": lambda a: (a["K"] / a["BK"],),
    "weight_gradient_kernel": lambda a: ((a["last"] - a["first"]) / a["BK"],),
}
