"""Matrix products together with what stands around them: bias, GELU, its gradient, the gradient of a bias.

A tile of the result stays in registers while bias and GELU are applied, so the activations are written once
and never read for it. Tiles are walked in groups of rows, which keeps the operands in the L2 cache. What needs
no such fusion is left to cuBLAS.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import arrival
from .aot import AotCase
from .arrival import arrive
from .gelu import normal_cdf

GROUP = 8
"""Rows of tiles that are walked together."""


def metadata(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    """What a kernel computes, for profilers: every product here is ``2 · rows · N · K``."""
    return {"name": kernel.name, "flops": 2 * args["rows"] * args["N"] * args["K"]}


@triton.jit
def tile_of(i_tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(row, column) of a tile when ``GROUP`` rows of tiles are walked down column by column."""
    i_first = i_tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - i_first, GROUP)
    i_in = i_tile % (GROUP * tiles_n)
    return i_first + i_in % height, i_in // height


@triton.jit
def within(o_n, N, EVEN: tl.constexpr):
    """Which offsets lie in the matrix; a constant where the blocks divide it."""
    if EVEN:
        return tl.full(o_n.shape, True, tl.int1)
    return o_n < N


@triton.jit
def halves(b_tile):
    """The left and the right columns of a tile."""
    return tl.split(tl.permute(tl.reshape(b_tile, (b_tile.shape[0], 2, b_tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def gelu_tile(b_x, p_bias, p_pre, p_out, o_r, m_r, first, N: tl.constexpr, BN: tl.constexpr):
    """Add the bias, write the sum and its GELU."""
    o_n = first + tl.arange(0, BN)
    m_n = within(o_n, N, N % BN == 0)
    if p_bias is not None:
        b_x += tl.load(p_bias + o_n, mask=m_n, other=0).to(tl.float32)[None, :]
    o_tile, m_tile = o_r[:, None] * N + o_n[None, :], m_r & m_n[None, :]
    if p_pre is not None:
        tl.store(p_pre + o_tile, b_x.to(p_pre.dtype.element_ty), mask=m_tile)
    if p_out is not None:
        b_cdf, _ = normal_cdf(b_x)
        tl.store(p_out + o_tile, (b_x * b_cdf).to(p_out.dtype.element_ty), mask=m_tile)


@triton.jit
def gelu_gradient_tile(b_grad, p_pre, p_dx, p_out, p_sums, o_r, m_r, first, N: tl.constexpr, BN: tl.constexpr):
    """Write the GELU, its gradient, and the sums of the gradient's columns."""
    o_n = first + tl.arange(0, BN)
    m_n = within(o_n, N, N % BN == 0)
    o_tile, m_tile = o_r[:, None] * N + o_n[None, :], m_r & m_n[None, :]
    b_pre = tl.load(p_pre + o_tile, mask=m_tile, other=0).to(tl.float32)
    b_cdf, b_exp = normal_cdf(b_pre)
    tl.store(p_out + o_tile, (b_pre * b_cdf).to(p_out.dtype.element_ty), mask=m_tile)
    b_grad *= b_cdf + b_pre * b_exp * 0.3989422804014327
    tl.store(p_dx + o_tile, b_grad.to(p_dx.dtype.element_ty), mask=m_tile)
    if p_sums is not None:
        tl.store(p_sums + o_n, tl.sum(b_grad, 0), mask=m_n)


@triton.jit
def sum_rows(p_sums, o_n, m_n, first, stride, count, N: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr):
    """Σ of ``count`` rows of partial sums, first, first + stride, …: always in the same order."""
    acc = tl.zeros((ROWS, BN), tl.float32)
    for i in range(0, count, ROWS):
        o_i = i + tl.arange(0, ROWS)
        p_rows = p_sums + (first + o_i * stride)[:, None] * N + o_n[None, :]
        acc += tl.load(p_rows, mask=(o_i < count)[:, None] & m_n[None, :], other=0, cache_modifier=".cg")
    return tl.sum(acc, 0)


@triton.jit(launch_metadata=metadata)
def linear_gelu_kernel(
    p_x,  # (rows, K)
    p_w,  # (N, K)
    p_bias,  # (N,) or None
    p_pre,  # (rows, N) or None, out: x·Wᵀ + b
    p_out,  # (rows, N) or None, out: its GELU
    rows, K,
    N: tl.constexpr, EVEN_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_m, i_n = tile_of(tl.program_id(0), tl.cdiv(rows, BM), tl.cdiv(N, BN), GROUP)
    o_r, o_n, o_k = tl.arange(0, BM), i_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    i_row = tl.cast(i_m, tl.int64) * BM
    m_r, m_n = (o_r < rows - i_row)[:, None], within(o_n, N, N % BN == 0)
    p_xs = p_x + i_row * K + (o_r[:, None] * K + o_k[None, :])
    p_ws = p_w + (o_n[:, None] * K + o_k[None, :])
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        m_k = within(k + o_k, K, EVEN_K)[None, :]
        b_x = tl.load(p_xs + k, mask=m_r & m_k, other=0)
        b_w = tl.load(p_ws + k, mask=m_n[:, None] & m_k, other=0)
        acc = tl.dot(b_x, tl.trans(b_w), acc, input_precision=PRECISION)
    if p_pre is not None:
        p_pre += i_row * N
    if p_out is not None:
        p_out += i_row * N
    # In halves, so that a thread does not hold all intermediate values of its part of the tile.
    b_left, b_right = halves(acc)
    gelu_tile(b_left, p_bias, p_pre, p_out, o_r, m_r, i_n * BN, N, BN // 2)
    gelu_tile(b_right, p_bias, p_pre, p_out, o_r, m_r, i_n * BN + BN // 2, N, BN // 2)


@triton.jit(launch_metadata=metadata)
def gelu_gradient_kernel(
    p_grad,  # (rows, K) gradient of the second product
    p_w,  # (K, N) its weight
    p_pre,  # (rows, N) input of the GELU
    p_dx,  # (rows, N), out: gradient of p_pre
    p_out,  # (rows, N), out: the GELU again
    p_dbias,  # (N,) fp32, out: sum of p_dx over the rows; None without bias
    p_partial,  # (row blocks, N) fp32 scratch: sums of each block of rows; None without bias
    p_count,  # (column blocks, 1 + groups) int32 zeros; None without bias
    rows, K,
    N: tl.constexpr, EVEN_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    SHARE: tl.constexpr, PRECISION: tl.constexpr,
):
    """The last of ``SHARE`` row blocks adds their sums up, the last of such groups those of the groups."""
    blocks = tl.cdiv(rows, BM)
    i_m, i_n = tile_of(tl.program_id(0), blocks, tl.cdiv(N, BN), GROUP)
    i_first, i_row = i_n * BN, tl.cast(i_m, tl.int64) * BM
    o_r, o_n, o_k = tl.arange(0, BM), i_first + tl.arange(0, BN), tl.arange(0, BK)
    m_r, m_n = (o_r < rows - i_row)[:, None], within(o_n, N, N % BN == 0)
    p_grads = p_grad + i_row * K + (o_r[:, None] * K + o_k[None, :])
    p_ws = p_w + (o_k[:, None] * N + o_n[None, :])
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        m_k = within(k + o_k, K, EVEN_K)
        b_grad = tl.load(p_grads + k, mask=m_r & m_k[None, :], other=0)
        b_w = tl.load(p_ws + k * N, mask=m_k[:, None] & m_n[None, :], other=0)
        acc = tl.dot(b_grad, b_w, acc, input_precision=PRECISION)
    p_pre += i_row * N
    p_dx += i_row * N
    p_out += i_row * N
    p_sums = None if p_partial is None else p_partial + i_m * N
    b_left, b_right = halves(acc)
    b_0, b_1 = halves(b_left)
    b_2, b_3 = halves(b_right)
    QUARTER: tl.constexpr = BN // 4
    gelu_gradient_tile(b_0, p_pre, p_dx, p_out, p_sums, o_r, m_r, i_first, N, QUARTER)
    gelu_gradient_tile(b_1, p_pre, p_dx, p_out, p_sums, o_r, m_r, i_first + QUARTER, N, QUARTER)
    gelu_gradient_tile(b_2, p_pre, p_dx, p_out, p_sums, o_r, m_r, i_first + 2 * QUARTER, N, QUARTER)
    gelu_gradient_tile(b_3, p_pre, p_dx, p_out, p_sums, o_r, m_r, i_first + 3 * QUARTER, N, QUARTER)
    if p_partial is not None:
        groups = tl.cdiv(blocks, SHARE)
        i_place = i_m // SHARE * SHARE
        members = tl.minimum(blocks - i_place, SHARE)
        p_counts = p_count + i_n * (1 + groups)
        if arrive(p_counts + 1 + i_m // SHARE, members):
            a_sum = sum_rows(p_partial, o_n, m_n, i_place, 1, members, N, BN, SHARE)
            tl.store(p_partial + i_place * N + o_n, a_sum, mask=m_n)
            if arrive(p_counts, groups):
                tl.store(p_dbias + o_n, sum_rows(p_partial, o_n, m_n, 0, SHARE, groups, N, BN, SHARE), mask=m_n)


@triton.jit
def product_over_rows(
    p_grad, p_x, first, last, o_n, o_k, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BR: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):
    """(gradᵀ·x, and with ``SUM`` (BN, 16) whose only column that is not 0 is that of the sums of grad)."""
    o_r = tl.arange(0, BR)
    m_n, m_k = within(o_n, N, N % BN == 0)[None, :], within(o_k, K, K % BK == 0)[None, :]
    # The tensor cores add the rows up: nothing else has to read the tile a second time.
    b_one = tl.broadcast_to((tl.arange(0, 16) == 0)[None, :], (BR, 16)).to(tl.float32).to(p_grad.dtype.element_ty)
    acc, a_sum = tl.zeros((BN, BK), tl.float32), tl.zeros((BN, 16), tl.float32)
    p_grads = p_grad + tl.cast(first, tl.int64) * N + (o_r[:, None] * N + o_n[None, :])
    p_xs = p_x + tl.cast(first, tl.int64) * K + (o_r[:, None] * K + o_k[None, :])
    for r in range(0, last - first, BR):
        m_r = (o_r < last - first - r)[:, None]
        b_grad = tl.trans(tl.load(p_grads, mask=m_r & m_n, other=0))
        b_x = tl.load(p_xs, mask=m_r & m_k, other=0)
        acc = tl.dot(b_grad, b_x, acc, input_precision=PRECISION)
        if SUM:
            # Ones are exact in TF32 and three terms of the other side in effect float32.
            a_sum = tl.dot(b_grad, b_one, a_sum, input_precision="ieee" if PRECISION == "ieee" else "tf32x3")
        p_grads += BR * N
        p_xs += BR * K
    return acc, a_sum


@triton.jit
def sum_places(
    p_partial, p_out, o_n, i_k, first, stride, count, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PIECE: tl.constexpr,
):
    """Write Σ of a tile at ``count`` places, first, first + stride, …: in this order, ``PIECE`` columns at a time."""
    for c in range(0, BK, PIECE):
        o_k = i_k * BK + c + tl.arange(0, PIECE)
        o_tile = o_n[:, None] * K + o_k[None, :]
        m_tile = within(o_n, N, N % BN == 0)[:, None] & within(o_k, K, K % BK == 0)[None, :]
        acc = tl.zeros((BN, PIECE), tl.float32)
        for i in range(count):
            p_place = p_partial + tl.cast(first + i * stride, tl.int64) * (N * K)
            acc += tl.load(p_place + o_tile, mask=m_tile, other=0, cache_modifier=".cg")
        # The first place may be the one that is written: all threads must have read it.
        tl.debug_barrier()
        tl.store(p_out + o_tile, acc.to(p_out.dtype.element_ty), mask=m_tile)


@triton.jit(launch_metadata=metadata)
def weight_gradient_kernel(
    p_grad,  # (rows, N)
    p_x,  # (rows, K)
    p_dw,  # (N, K), out: gradᵀ·x
    p_dbias,  # (N,) fp32, out: sums of the columns of grad; None if not wanted
    p_partial,  # (SPLITS, N, K) fp32 scratch; None when SPLITS is 1
    p_sums,  # (SPLITS, N) fp32 scratch; None as p_partial or p_dbias
    p_count,  # (tiles, 1 + groups) int32 zeros
    rows,
    N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
    SPLITS: tl.constexpr, SHARE: tl.constexpr, PRECISION: tl.constexpr,
):
    """The rows are split among programs. The last of a group of ``SHARE`` adds its group up, the last group all."""
    i_n, i_k = tile_of(tl.program_id(0), tl.cdiv(N, BN), tl.cdiv(K, BK), GROUP)
    i_split = tl.program_id(1)
    o_n, o_k = i_n * BN + tl.arange(0, BN), i_k * BK + tl.arange(0, BK)
    m_n = within(o_n, N, N % BN == 0)
    o_tile = o_n[:, None] * K + o_k[None, :]
    m_tile = m_n[:, None] & within(o_k, K, K % BK == 0)[None, :]
    share = tl.cdiv(tl.cdiv(rows, BR), SPLITS) * BR
    first = i_split * share
    last = tl.minimum(first + share, rows)
    if p_dbias is None:
        acc, a_sum = product_over_rows(p_grad, p_x, first, last, o_n, o_k, N, K, BN, BK, BR, False, PRECISION)
    elif i_k == 0:
        acc, a_sum = product_over_rows(p_grad, p_x, first, last, o_n, o_k, N, K, BN, BK, BR, True, PRECISION)
    else:
        acc, a_sum = product_over_rows(p_grad, p_x, first, last, o_n, o_k, N, K, BN, BK, BR, False, PRECISION)
    m_sum = m_n & (i_k == 0)
    if SPLITS == 1:
        tl.store(p_dw + o_tile, acc.to(p_dw.dtype.element_ty), mask=m_tile)
        if p_dbias is not None:
            tl.store(p_dbias + o_n, tl.sum(a_sum, 1), mask=m_sum)
    else:
        PIECE: tl.constexpr = BK if BK < 32 else 32
        GROUPS: tl.constexpr = (SPLITS + SHARE - 1) // SHARE
        tl.store(p_partial + tl.cast(i_split, tl.int64) * (N * K) + o_tile, acc, mask=m_tile)
        if p_dbias is not None:
            tl.store(p_sums + i_split * N + o_n, tl.sum(a_sum, 1), mask=m_sum)
        p_counts = p_count + tl.program_id(0) * (1 + GROUPS)
        i_place = i_split // SHARE * SHARE
        members = tl.minimum(SPLITS - i_place, SHARE)
        if arrive(p_counts + 1 + i_split // SHARE, members):
            p_place = p_partial + tl.cast(i_place, tl.int64) * (N * K)
            sum_places(p_partial, p_place, o_n, i_k, i_place, 1, members, N, K, BN, BK, PIECE)
            if arrive(p_counts, GROUPS):
                sum_places(p_partial, p_dw, o_n, i_k, 0, SHARE, GROUPS, N, K, BN, BK, PIECE)
                if p_dbias is not None:
                    tl.store(p_dbias + o_n, sum_rows(p_sums, o_n, m_sum, 0, 1, SPLITS, N, BN, 16), mask=m_sum)


def _block(width: int, limit: int) -> int:
    return max(16, min(limit, triton.next_power_of_2(width)))


def forward_config(columns: int, depth: int, dtype: torch.dtype, sm: int) -> dict[str, int]:
    """Tiles of :func:`linear_gelu_kernel` that leave room for two blocks on a multiprocessor of ``sm_<sm>``."""
    if dtype == torch.float32:
        return {"BM": 64, "BN": _block(columns, 64), "BK": 32, "num_warps": 4, "num_stages": 3}
    deep = 64 if sm >= 90 and depth % 64 == 0 else 32
    return {"BM": 128, "BN": _block(columns, 128), "BK": deep, "num_warps": 8, "num_stages": 3 if deep == 64 else 4}


def gradient_config(columns: int, depth: int, dtype: torch.dtype, sm: int) -> dict[str, int]:
    """As :func:`forward_config`, for :func:`gelu_gradient_kernel`, which holds more values at once."""
    narrow = {} if sm >= 90 or dtype == torch.float32 else {"BN": _block(columns, 64)}
    shape = forward_config(columns, depth, dtype, sm) | narrow
    # Its tile is taken apart in four.
    return {**shape, "BN": max(shape["BN"], 64), "SHARE": 64}


def weight_config(columns: int, depth: int, dtype: torch.dtype, sm: int) -> dict[str, int]:
    """Tiles of :func:`weight_gradient_kernel`: ``BN`` × ``BK`` of the result and ``BR`` rows at a time."""
    if dtype == torch.float32:
        return {"BN": _block(columns, 64), "BK": _block(depth, 64), "BR": 32, "num_warps": 4, "num_stages": 3}
    wide = 128 if sm == 90 and (depth % 128 == 0 or depth % 64) else 64
    deep = 64 if sm >= 90 else 32
    return {"BN": _block(columns, 128), "BK": _block(depth, wide), "BR": deep, "num_warps": 8,
            "num_stages": 3 if deep == 64 else 4}


def split_rows(rows: int, tiles: int, block: int, at_once: int) -> tuple[int, int]:
    """(parts of the rows, parts that are added up together), so that ``at_once`` programs have work.

    A part has eight blocks of rows at least; two levels of about √parts additions are shortest.
    """
    splits = max(1, min(at_once // tiles, triton.cdiv(rows, 8 * block)))
    splits = triton.cdiv(triton.cdiv(rows, block), triton.cdiv(triton.cdiv(rows, block), splits))  # no part is empty
    return splits, splits if splits <= 4 else math.isqrt(splits - 1) + 1


def programs_at_once(device: torch.device) -> int:
    """Two on each multiprocessor; in the interpreter, enough to split."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 6


def _sm(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, *, pre: bool, gelu: bool
                ) -> tuple[Tensor | None, Tensor | None]:
    """(z = x·Wᵀ + b, GELU(z)) of (M, K), (N, K) and (N,), each where wanted, in one launch."""
    x, weight, bias = x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
    (rows, depth), columns = x.shape, weight.shape[0]
    tiles = forward_config(columns, depth, x.dtype, _sm(x.device))
    z, out = (x.new_empty(rows, columns) if wanted else None for wanted in (pre, gelu))
    grid = (triton.cdiv(rows, tiles["BM"]) * triton.cdiv(columns, tiles["BN"]),)
    linear_gelu_kernel[grid](x, weight, bias, z, out, rows, depth, N=columns, EVEN_K=depth % tiles["BK"] == 0,
                             GROUP=GROUP, PRECISION=_precision(), **tiles)
    return z, out


def gelu_gradient(grad: Tensor, weight: Tensor, pre: Tensor, bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(d pre = (grad·W)·GELU'(pre), its sum over the rows in fp32 or empty, GELU(pre)) in one launch.

    Args:
        grad: (M, D) contiguous.
        weight: (D, N) of the product after the GELU.
        pre: (M, N).
        bias: The sum is wanted.
    """
    weight = weight.contiguous()
    (rows, depth), columns, device = grad.shape, weight.shape[1], grad.device
    tiles = gradient_config(columns, depth, grad.dtype, _sm(device))
    blocks, across = triton.cdiv(rows, tiles["BM"]), triton.cdiv(columns, tiles["BN"])
    dx, out = torch.empty_like(pre), torch.empty_like(pre)
    sums = [torch.empty(n, columns, dtype=torch.float32, device=device) for n in (1, blocks)] if bias else [None, None]
    count = arrival.counters(across * (1 + triton.cdiv(blocks, tiles["SHARE"])), device) if bias else None
    gelu_gradient_kernel[(blocks * across,)](
        grad, weight, pre, dx, out, *sums, count, rows, depth, N=columns, EVEN_K=depth % tiles["BK"] == 0,
        GROUP=GROUP, PRECISION=_precision(), **tiles)
    return dx, sums[0][0] if bias else dx.new_empty(0, dtype=torch.float32), out


def weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(gradᵀ·x in ``dtype``, Σ of the rows of grad in fp32) of contiguous (M, N) and (M, K) in one launch."""
    (rows, columns), depth, device = grad.shape, x.shape[1], grad.device
    tiles = weight_config(columns, depth, grad.dtype, _sm(device))
    blocks = triton.cdiv(columns, tiles["BN"]) * triton.cdiv(depth, tiles["BK"])
    splits, share = split_rows(rows, blocks, tiles["BR"], programs_at_once(device))
    dw, d_bias = (torch.empty(size, dtype=kind, device=device)
                  for size, kind in (((columns, depth), dtype), ((columns,), torch.float32)))
    scratch: tuple[Tensor | None, ...] = None, None, None
    if splits > 1:
        scratch = (*(torch.empty(splits, *size, dtype=torch.float32, device=device)
                     for size in ((columns, depth), (columns,))),
                   arrival.counters(blocks * (1 + triton.cdiv(splits, share)), device))
    weight_gradient_kernel[(blocks, splits)](
        grad, x, dw, d_bias, *scratch, rows, N=columns, K=depth, GROUP=GROUP, SPLITS=splits, SHARE=share,
        PRECISION=_precision(), **tiles)
    return dw, d_bias


_FLOAT32 = ("p_bias", "p_dw", "p_dbias", "p_partial", "p_sums")
_STAGES = {"swin_s": (96, (1, 8)), "swin_b": (128, (1, 4, 8)), "swin_l": (192, (1, 8)), "swinv2_h": (352, (1, 8)),
           "swinv2_g": (512, (1, 8))}
"""Width of the first stage and the multiples of it that are compiled; the others differ in sizes only."""


def _case(name: str, kernel: Any, tiles: dict[str, int], constexprs: dict[str, Any], sm: int, quick: bool) -> AotCase:
    warps, stages = tiles["num_warps"], tiles["num_stages"]
    constexprs = {"GROUP": GROUP, "PRECISION": "ieee", **constexprs, **{k: v for k, v in tiles.items() if k[0] != "n"}}
    signature = {n: "*fp32" if n in _FLOAT32 else "*i32" if n == "p_count" else "*bf16" if n[:2] == "p_" else "i32"
                 for n in kernel.arg_names if n not in constexprs}
    # sm_103 and sm_120 have a compiler target of their own, and tiles as sm_100.
    return AotCase(f"{name}-sm{sm}", kernel, signature, constexprs, warps, stages, tuple(signature), quick, dot=True,
                   archs=(sm,))


def aot_cases() -> list[AotCase]:
    """First and last stages of the shipped encoders in bf16, batch 128 at 192 pixels where the rows matter."""
    cases, low = [], torch.bfloat16
    for name, (base, widths) in _STAGES.items():
        for width, sm in [(w, sm) for w in widths for sm in (80, 90, 100)]:
            c, quick = base * width, name == "swin_b" and width == 4
            rows, even = 128 * 48 * 48 // width**2, {}
            for kernel, config, title, extra in (
                    (linear_gelu_kernel, forward_config, "fc1", {}),
                    (linear_gelu_kernel, forward_config, "fc1-no-pre", {"p_pre": None}),
                    (gelu_gradient_kernel, gradient_config, "fc2-gradient", {})):
                tiles = config(4 * c, c, low, sm)
                even = {"N": 4 * c, "EVEN_K": c % tiles["BK"] == 0}
                cases.append(_case(f"{title}/{name}-c{c}", kernel, tiles, even | extra, sm, quick))
            tiles = weight_config(3 * c, c, low, sm)
            blocks = triton.cdiv(3 * c, tiles["BN"]) * triton.cdiv(c, tiles["BK"])
            splits, share = split_rows(rows, blocks, tiles["BR"], 2 * {80: 108, 90: 132, 100: 148}[sm])
            extra = {"N": 3 * c, "K": c, "SPLITS": splits, "SHARE": share}
            if splits == 1:
                extra |= {"p_partial": None, "p_sums": None, "p_count": None}
            cases.append(_case(f"qkv-weight/{name}-c{c}", weight_gradient_kernel, tiles, extra, sm, quick))
    return cases
