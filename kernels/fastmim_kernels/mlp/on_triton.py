"""The product before a GELU and the product of its gradient, bias and GELU applied to the tile in registers.

The activations are written once and never read for it; tiles are walked in groups of rows, which keeps the
operands in the L2 cache.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import arrival
from ..common.aot_case import AotCase
from ..common.arrival import arrive
from ..common.device import sm_of
from ..common.matmul import (
    GROUP,
    STAGES,
    aot_case,
    aot_dtypes,
    for_two_blocks,
    halves,
    metadata,
    narrow_config,
    precision,
    sum_rows,
    tile_config,
    tile_of,
    within,
)
from ..common.rows import nothing
from ..common.sizes import cdiv
from ..linear.on_torch import in_dtype_of, product, weight_gradient
from ..linear.on_triton import input_gradient, parameter_gradients
from ..linear.policy import make, wide_tiles
from .gelu_on_triton import backward_and_output as gelu_backward_and_output
from .gelu_on_triton import forward as gelu_forward
from .gelu_on_triton import normal_cdf

TOGETHER = 64
"""Row blocks of :func:`gelu_gradient_kernel` whose sums are added up together."""


@triton.jit
def gelu_tile(b_x, p_bias, p_pre, p_out, o_r, m_r, first, N: tl.constexpr, EVEN_N: tl.constexpr,
              BN: tl.constexpr):
    """Add the bias, write the sum and its GELU."""
    o_n = first + tl.arange(0, BN)
    m_n = within(o_n, N, EVEN_N)
    if p_bias is not None:
        b_x += tl.load(p_bias + o_n, mask=m_n, other=0).to(tl.float32)[None, :]
    o_tile, m_tile = o_r[:, None] * N + o_n[None, :], m_r & m_n[None, :]
    if p_pre is not None:
        tl.store(p_pre + o_tile, b_x.to(p_pre.dtype.element_ty), mask=m_tile)
    if p_out is not None:
        b_cdf, _ = normal_cdf(b_x)
        tl.store(p_out + o_tile, (b_x * b_cdf).to(p_out.dtype.element_ty), mask=m_tile)


@triton.jit
def gelu_gradient_tile(b_grad, p_pre, p_dx, p_out, p_sums, o_r, m_r, first, N: tl.constexpr, EVEN_N: tl.constexpr,
                       BN: tl.constexpr):
    """Write the GELU, its gradient, and the sums of the gradient's columns."""
    o_n = first + tl.arange(0, BN)
    m_n = within(o_n, N, EVEN_N)
    o_tile, m_tile = o_r[:, None] * N + o_n[None, :], m_r & m_n[None, :]
    b_pre = tl.load(p_pre + o_tile, mask=m_tile, other=0).to(tl.float32)
    b_cdf, b_exp = normal_cdf(b_pre)
    tl.store(p_out + o_tile, (b_pre * b_cdf).to(p_out.dtype.element_ty), mask=m_tile)
    b_grad *= b_cdf + b_pre * b_exp * 0.3989422804014327
    tl.store(p_dx + o_tile, b_grad.to(p_dx.dtype.element_ty), mask=m_tile)
    if p_sums is not None:
        tl.store(p_sums + o_n, tl.sum(b_grad, 0), mask=m_n)


@triton.jit(launch_metadata=metadata, do_not_specialize=["rows"])
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
    EVEN_N: tl.constexpr = N % BN == 0
    i_m, i_n = tile_of(tl.program_id(0), tl.cdiv(rows, BM), tl.cdiv(N, BN), GROUP)
    o_r, o_n, o_k = tl.arange(0, BM), i_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    i_row = tl.cast(i_m, tl.int64) * BM
    m_r, m_n = (o_r < rows - i_row)[:, None], within(o_n, N, EVEN_N)
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
    gelu_tile(b_left, p_bias, p_pre, p_out, o_r, m_r, i_n * BN, N, EVEN_N, BN // 2)
    gelu_tile(b_right, p_bias, p_pre, p_out, o_r, m_r, i_n * BN + BN // 2, N, EVEN_N, BN // 2)


@triton.jit(launch_metadata=metadata, do_not_specialize=["rows"])
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
    EVEN_N: tl.constexpr = N % BN == 0
    blocks = tl.cdiv(rows, BM)
    i_m, i_n = tile_of(tl.program_id(0), blocks, tl.cdiv(N, BN), GROUP)
    i_first, i_row = i_n * BN, tl.cast(i_m, tl.int64) * BM
    o_r, o_n, o_k = tl.arange(0, BM), i_first + tl.arange(0, BN), tl.arange(0, BK)
    m_r, m_n = (o_r < rows - i_row)[:, None], within(o_n, N, EVEN_N)
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
    gelu_gradient_tile(b_0, p_pre, p_dx, p_out, p_sums, o_r, m_r, i_first, N, EVEN_N, QUARTER)
    gelu_gradient_tile(b_1, p_pre, p_dx, p_out, p_sums, o_r, m_r, i_first + QUARTER, N, EVEN_N, QUARTER)
    gelu_gradient_tile(b_2, p_pre, p_dx, p_out, p_sums, o_r, m_r, i_first + 2 * QUARTER, N, EVEN_N, QUARTER)
    gelu_gradient_tile(b_3, p_pre, p_dx, p_out, p_sums, o_r, m_r, i_first + 3 * QUARTER, N, EVEN_N, QUARTER)
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


@lru_cache(maxsize=256)
def forward_config(columns: int, depth: int, dtype: torch.dtype, sm: int) -> dict[str, int]:
    """For :func:`linear_gelu_kernel`."""
    return for_two_blocks(tile_config(columns, depth, dtype, sm))


@lru_cache(maxsize=256)
def gradient_config(columns: int, depth: int, dtype: torch.dtype, sm: int) -> dict[str, int]:
    """For :func:`gelu_gradient_kernel`, whose tile is taken apart in four."""
    tiles = narrow_config(columns, depth, dtype, sm)
    return for_two_blocks({**tiles, "BN": max(tiles["BN"], 64), "SHARE": TOGETHER})


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, *, pre: bool, gelu: bool,
                tiles: dict[str, int] | None = None) -> tuple[Tensor, Tensor]:
    """(z = x·Wᵀ + b as (M, N), GELU(z) as (…, N)) of (…, K), (N, K) and (N,), each empty where not wanted.

    In one launch; ``tiles`` replaces those of :func:`forward_config`.
    """
    x, weight, bias = x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
    columns, depth = weight.shape
    rows = x.numel() // depth
    tiles = forward_config(columns, depth, x.dtype, sm_of(x.device)) if tiles is None else tiles
    z = x.new_empty(rows, columns) if pre else None
    out = x.new_empty((*x.shape[:-1], columns)) if gelu else None
    grid = (cdiv(rows, tiles["BM"]) * cdiv(columns, tiles["BN"]),)
    linear_gelu_kernel.run(x, weight, bias, z, out, rows, depth, N=columns,
                           EVEN_K=depth % tiles["BK"] == 0, GROUP=GROUP, PRECISION=precision(x.dtype), **tiles,
                           grid=grid, warmup=False)
    return nothing(x) if z is None else z, nothing(x) if out is None else out


def hidden(x: Tensor, weight: Tensor, bias: Tensor | None, *, pre: bool, gelu: bool) -> tuple[Tensor, Tensor]:
    """As :func:`linear_gelu`, in one launch or as cuBLAS' product and a pass behind it, whichever is faster."""
    columns, depth = weight.shape

    def apart() -> tuple[Tensor, Tensor]:
        z = product(x, weight, bias)
        return z.view(-1, columns) if pre else nothing(x), gelu_forward(z, None) if gelu else nothing(x)

    def fused(tiles: dict[str, int] | None = None) -> tuple[Tensor, Tensor]:
        return linear_gelu(x, weight, bias, pre=pre, gelu=gelu, tiles=tiles)

    return make("linear_gelu", x.numel() // depth, columns, depth, x, fused, apart)


def hidden_gradient(grad: Tensor, weight: Tensor, pre: Tensor, bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`gelu_gradient`, in one launch or as cuBLAS' product and a pass behind it, whichever is faster."""
    depth, columns = weight.shape

    def apart() -> tuple[Tensor, Tensor, Tensor]:
        return gelu_backward_and_output(product(grad, weight.t(), None).view(pre.shape), pre, bias)

    def fused(tiles: dict[str, int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        return gelu_gradient(grad, weight, pre, bias, tiles)

    return make("gelu_gradient", len(pre), columns, depth, grad, fused, apart)


def gelu_gradient(grad: Tensor, weight: Tensor, pre: Tensor, bias: bool, tiles: dict[str, int] | None = None
                  ) -> tuple[Tensor, Tensor, Tensor]:
    """(d pre = (grad·W)·GELU'(pre), its sum over the rows in fp32 or empty, GELU(pre)) in one launch.

    Args:
        grad: (…, D) contiguous, of M rows.
        weight: (D, N) of the product after the GELU.
        pre: (M, N).
        bias: The sum is wanted.
        tiles: In place of those of :func:`gradient_config`, without ``SHARE``.
    """
    weight = weight.contiguous()
    (depth, columns), device = weight.shape, grad.device
    rows = grad.numel() // depth
    given = None if tiles is None else {**tiles, "SHARE": TOGETHER}
    tiles = given or gradient_config(columns, depth, grad.dtype, sm_of(device))
    blocks, across = cdiv(rows, tiles["BM"]), cdiv(columns, tiles["BN"])
    dx, out = torch.empty_like(pre), torch.empty_like(pre)
    d_bias = partial = count = None
    if bias:
        d_bias = torch.empty(columns, dtype=torch.float32, device=device)
        partial = torch.empty(blocks, columns, dtype=torch.float32, device=device)
        count = arrival.counters(across * (1 + cdiv(blocks, tiles["SHARE"])), device)
    gelu_gradient_kernel.run(
        grad, weight, pre, dx, out, d_bias, partial, count, rows, depth, N=columns, EVEN_K=depth % tiles["BK"] == 0,
        GROUP=GROUP, PRECISION=precision(grad.dtype), **tiles, grid=(blocks * across,), warmup=False)
    return dx, nothing(dx, torch.float32) if d_bias is None else d_bias, out


def forward(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None,
            low_weight1: Tensor | None, low_weight2: Tensor | None, recompute_fc1: bool
            ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results of the op ``fastmim::mlp``; the second product is cuBLAS's."""
    (low1, cast1), (low2, cast2) = in_dtype_of(x, weight1, low_weight1), in_dtype_of(x, weight2, low_weight2)
    pre, activation = hidden(x, low1, bias1, pre=not recompute_fc1, gelu=True)
    return product(activation, low2, bias2), pre, cast1, cast2, nothing(x)


def backward(grad: Tensor, x: Tensor, pre: Tensor, _: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor,
             has_bias2: bool, weight1_dtype: torch.dtype, weight2_dtype: torch.dtype, add: Tensor | None
             ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results of the op ``fastmim::mlp_backward``."""
    grad = grad.contiguous()
    if not pre.numel():  # as forward would have kept it, bit for bit
        pre, _ = hidden(x, weight1, bias1, pre=True, gelu=False)
    d_hidden, d_bias1, activation = hidden_gradient(grad, weight2, pre, bias1 is not None)
    d_weight2, d_bias2 = parameter_gradients(grad, activation, weight2_dtype, has_bias2)
    del activation
    d_weight1 = weight_gradient(d_hidden, x.reshape(-1, x.shape[-1]), weight1_dtype)
    return input_gradient(d_hidden, weight1, add).view(x.shape), d_weight1, d_bias1, d_weight2, d_bias2


def aot_cases() -> list[AotCase]:
    """First and last stages of the shipped encoders, in bf16, and one of them in fp32."""
    cases = []
    for name, (base, widths) in STAGES.items():
        for c, sm in [(base * width, sm) for width in widths for sm in (80, 90, 100)]:
            quick = name == "swin_b" and c == 512
            for title, kernel, config, extra in (
                    ("fc1", linear_gelu_kernel, forward_config, {}),
                    ("fc1-activation", linear_gelu_kernel, forward_config, {"p_pre": None}),
                    ("fc2-gradient", gelu_gradient_kernel, gradient_config, {})):
                for dtype in aot_dtypes(quick, sm):
                    tiles = config(4 * c, c, dtype, sm)
                    given = {"N": 4 * c, "EVEN_K": c % tiles["BK"] == 0, **extra}
                    cases.append(aot_case(f"{title}/{name}-c{c}", kernel, tiles, given, sm, quick, dtype))
                if wide := wide_tiles(4 * c, torch.bfloat16, sm):
                    tiles = wide | {"SHARE": TOGETHER} if kernel is gelu_gradient_kernel else wide
                    given = {"N": 4 * c, "EVEN_K": c % tiles["BK"] == 0, **extra}
                    cases.append(aot_case(f"{title}-wide/{name}-c{c}", kernel, tiles, given, sm, quick, alone=True))
    return cases
