"""A matrix product onto a tensor that stays as it is: gradients of an input's two readers, added in registers.

cuBLAS adds in place only; out of place, torch copies the tensor first, which is a pass of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot_case import AotCase
from ..common.device import sm_of
from ..common.matmul import (
    GROUP,
    STAGES,
    aot_case,
    aot_dtypes,
    halves,
    metadata,
    narrow_config,
    precision,
    tile_of,
    within,
)
from ..common.sizes import cdiv
from .policy import wide_tiles


@triton.jit
def add_tile(b_x, p_add, p_out, o_r, m_r, first, N: tl.constexpr, EVEN_N: tl.constexpr, BN: tl.constexpr):
    o_n = first + tl.arange(0, BN)
    o_tile, m_tile = o_r[:, None] * N + o_n[None, :], m_r & within(o_n, N, EVEN_N)[None, :]
    b_x += tl.load(p_add + o_tile, mask=m_tile, other=0).to(tl.float32)
    tl.store(p_out + o_tile, b_x.to(p_out.dtype.element_ty), mask=m_tile)


@triton.jit(launch_metadata=metadata, do_not_specialize=["rows"])
def product_add_kernel(
    p_x,  # (rows, K)
    p_w,  # (K, N)
    p_add,  # (rows, N)
    p_out,  # (rows, N), out: x·W + p_add
    rows, K,
    N: tl.constexpr, EVEN_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    EVEN_N: tl.constexpr = N % BN == 0
    i_m, i_n = tile_of(tl.program_id(0), tl.cdiv(rows, BM), tl.cdiv(N, BN), GROUP)
    i_first, i_row = i_n * BN, tl.cast(i_m, tl.int64) * BM
    o_r, o_n, o_k = tl.arange(0, BM), i_first + tl.arange(0, BN), tl.arange(0, BK)
    m_r, m_n = (o_r < rows - i_row)[:, None], within(o_n, N, EVEN_N)[None, :]
    p_xs = p_x + i_row * K + (o_r[:, None] * K + o_k[None, :])
    p_ws = p_w + (o_k[:, None] * N + o_n[None, :])
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        m_k = within(k + o_k, K, EVEN_K)
        b_x = tl.load(p_xs + k, mask=m_r & m_k[None, :], other=0)
        b_w = tl.load(p_ws + k * N, mask=m_k[:, None] & m_n, other=0)
        acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION)
    b_left, b_right = halves(acc)
    p_add += i_row * N
    p_out += i_row * N
    add_tile(b_left, p_add, p_out, o_r, m_r, i_first, N, EVEN_N, BN // 2)
    add_tile(b_right, p_add, p_out, o_r, m_r, i_first + BN // 2, N, EVEN_N, BN // 2)


def product_add(x: Tensor, weight: Tensor, add: Tensor, tiles: dict[str, int] | None = None) -> Tensor:
    """``x·W + add`` of (…, K), (K, N) and (…, N) in the dtype of x, rounded once; in the shape of ``add``.

    ``tiles`` replaces those of :func:`.narrow_config`.
    """
    x, weight, add = x.contiguous(), weight.contiguous(), add.contiguous()
    depth, columns = weight.shape
    rows = x.numel() // depth
    tiles = narrow_config(columns, depth, x.dtype, sm_of(x.device)) if tiles is None else tiles
    out = torch.empty_like(add)
    grid = (cdiv(rows, tiles["BM"]) * cdiv(columns, tiles["BN"]),)
    product_add_kernel.run(x, weight, add, out, rows, depth, N=columns, EVEN_K=depth % tiles["BK"] == 0, GROUP=GROUP,
                           PRECISION=precision(x.dtype), **tiles, grid=grid, warmup=False)
    return out


def aot_cases() -> list[AotCase]:
    """The gradient of fc1's input, in bf16 and once in fp32; that of qkv differs in its depth, a run-time argument."""
    cases = []
    for name, (base, widths) in STAGES.items():
        for c, sm in [(base * width, sm) for width in widths for sm in (80, 90, 100)]:
            quick = name == "swin_b" and c == 512
            for dtype in aot_dtypes(quick, sm):
                tiles = narrow_config(c, 4 * c, dtype, sm)
                extra = {"N": c, "EVEN_K": 4 * c % tiles["BK"] == 0}
                cases.append(aot_case(f"fc1-input/{name}-c{c}", product_add_kernel, tiles, extra, sm, quick, dtype))
            if wide := wide_tiles(c, torch.bfloat16, sm):
                extra = {"N": c, "EVEN_K": True}
                cases.append(aot_case(f"fc1-input-wide/{name}-c{c}", product_add_kernel, wide, extra, sm, quick,
                                      alone=True))
    return cases
