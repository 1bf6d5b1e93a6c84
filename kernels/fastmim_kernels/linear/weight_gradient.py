"""The gradient of a linear layer's weight and, out of the same pass over the gradient, of its bias.

The rows are split among programs, which makes enough of them where the weight is small; the parts are added up
in a fixed order by whichever program comes last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import arrival
from ..common.aot_case import AotCase
from ..common.arrival import arrive
from ..common.device import processors, sm_of
from ..common.matmul import (
    GROUP,
    STAGES,
    aot_case,
    aot_dtypes,
    block,
    for_two_blocks,
    metadata,
    precision,
    sum_rows,
    tile_of,
    within,
)
from ..common.sizes import cdiv

PART = 8
"""Blocks of rows that a part has at least."""


@triton.jit
def product_over_rows(
    p_grad, p_x, first, last, o_n, o_k, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BR: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):
    """(gradᵀ·x, and with ``SUM`` (BN, 16) whose only column that is not 0 is that of the sums of grad)."""
    o_r = tl.arange(0, BR)
    m_n, m_k = within(o_n, N, N % BN == 0)[:, None], within(o_k, K, K % BK == 0)[None, :]
    # The tensor cores add the rows up: nothing else has to read the tile a second time.
    b_one = tl.broadcast_to((tl.arange(0, 16) == 0)[None, :], (BR, 16)).to(tl.float32).to(p_grad.dtype.element_ty)
    acc, a_sum = tl.zeros((BN, BK), tl.float32), tl.zeros((BN, 16), tl.float32)
    p_grads = p_grad + tl.cast(first, tl.int64) * N + (o_r[None, :] * N + o_n[:, None])
    p_xs = p_x + tl.cast(first, tl.int64) * K + (o_r[:, None] * K + o_k[None, :])
    for r in range(0, last - first, BR):
        m_r = o_r < last - first - r
        b_grad = tl.load(p_grads, mask=m_n & m_r[None, :], other=0)
        b_x = tl.load(p_xs, mask=m_r[:, None] & m_k, other=0)
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


@lru_cache(maxsize=256)
def weight_config(columns: int, depth: int, dtype: torch.dtype, sm: int) -> dict[str, int]:
    """Tiles of :func:`weight_gradient_kernel`: ``BN`` × ``BK`` of the result and ``BR`` rows at a time."""
    if dtype == torch.float32:
        return {"BN": block(columns, 64), "BK": block(depth, 64), "BR": 32, "num_warps": 4, "num_stages": 3}
    wide = 128 if sm == 90 and (depth % 128 == 0 or depth % 64) else 64
    deep = 64 if sm >= 90 else 32
    return for_two_blocks({"BN": block(columns, 128), "BK": block(depth, wide), "BR": deep,
                           "num_warps": 8 if sm >= 90 else 4, "num_stages": 3 if deep == 64 else 4})


def split_rows(rows: int, tiles: int, block: int, at_once: int) -> tuple[int, int]:
    """(parts of the rows, parts that are added up together), so that ``at_once`` programs have work.

    Two levels of about √parts additions are shortest.
    """
    blocks = cdiv(rows, block)
    splits = max(1, min(at_once // tiles, cdiv(blocks, PART)))
    splits = cdiv(blocks, cdiv(blocks, splits))  # no part is empty
    return splits, splits if splits <= 4 else math.isqrt(splits - 1) + 1


def programs_at_once(device: torch.device) -> int:
    """One on each multiprocessor: more parts would be more to write and to add; in the interpreter, some."""
    return processors(device, elsewhere=6)


def weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(gradᵀ·x in ``dtype``, Σ of the rows of grad in fp32) of contiguous (…, N) and (…, K) in one launch."""
    columns, depth, device = grad.shape[-1], x.shape[-1], grad.device
    rows = grad.numel() // columns
    tiles = weight_config(columns, depth, grad.dtype, sm_of(device))
    blocks = cdiv(columns, tiles["BN"]) * cdiv(depth, tiles["BK"])
    splits, share = split_rows(rows, blocks, tiles["BR"], programs_at_once(device))
    dw = torch.empty(columns, depth, dtype=dtype, device=device)
    d_bias = torch.empty(columns, dtype=torch.float32, device=device)
    scratch: tuple[Tensor | None, ...] = None, None, None
    if splits > 1:
        scratch = (torch.empty(splits, columns, depth, dtype=torch.float32, device=device),
                   torch.empty(splits, columns, dtype=torch.float32, device=device),
                   arrival.counters(blocks * (1 + cdiv(splits, share)), device))
    weight_gradient_kernel.run(
        grad, x, dw, d_bias, *scratch, rows, N=columns, K=depth, GROUP=GROUP, SPLITS=splits, SHARE=share,
        PRECISION=precision(grad.dtype), **tiles, grid=(blocks, splits), warmup=False)
    return dw, d_bias


def _trips(a: Mapping[str, Any]) -> tuple[float, ...]:
    """Of the loop without sums and then, with a bias, of that with them, which the first column of tiles takes."""
    blocks, first = a["rows"] / a["BR"] / a["SPLITS"], 1 / -(-a["K"] // a["BK"])
    return (blocks,) if a["p_dbias"] is None else (blocks * (1 - first), blocks * first)


def aot_cases() -> list[AotCase]:
    """qkv in the first and last stages of the shipped encoders in bf16: 128 images of 192 pixels, which sets SPLITS."""
    cases = []
    for name, (base, widths) in STAGES.items():
        for width, (sm, at_once) in [(w, arch) for w in widths for arch in ((80, 108), (90, 132), (100, 148))]:
            c = base * width
            quick = name == "swin_b" and c == 512
            for dtype in aot_dtypes(quick, sm):
                tiles = weight_config(3 * c, c, dtype, sm)
                blocks = cdiv(3 * c, tiles["BN"]) * cdiv(c, tiles["BK"])
                splits, share = split_rows(128 * 48 * 48 // width**2, blocks, tiles["BR"], at_once)
                extra: dict[str, Any] = {"N": 3 * c, "K": c, "SPLITS": splits, "SHARE": share}
                if splits == 1:
                    extra |= {"p_partial": None, "p_sums": None, "p_count": None}
                cases.append(aot_case(f"qkv/{name}-c{c}", weight_gradient_kernel, tiles, extra, sm, quick, dtype,
                                      _trips))
    return cases
