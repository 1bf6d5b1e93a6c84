"""Triton kernels of ``gelu``: exact (erf) GELU with the linear layer's bias, forward and backward.

A program walks down a block of columns, so that the bias is read, and its gradient's partial sums are
written, once a program; the partials are added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot_case import AotCase
from ..common.device import processors
from ..common.rows import nothing
from ..common.sizes import cdiv, next_power_of_2

ELEMENTS_PER_THREAD = 8
"""One 128-bit access of bf16 a tensor."""
WARPS_PER_SM = {"forward": 48, "backward": 28}
"""What the registers allow at once; more programs would come as a second, nearly empty wave."""
LOG2E = tl.constexpr(1.4426950408889634)


@lru_cache(maxsize=256)
def config(columns: int) -> dict[str, int]:
    """Tile of ``BLOCK_R`` rows by ``BLOCK_N`` columns: 256 or 128 columns where they divide the width.

    The same for every architecture and dtype: there is no dot, and the limit is the memory.
    """
    block_n = next((b for b in (256, 128) if columns % b == 0), min(next_power_of_2(columns), 256))
    block_n = max(block_n, 16)
    return {"BLOCK_R": 4 * 32 * ELEMENTS_PER_THREAD // block_n, "BLOCK_N": block_n, "STAGES": 2, "num_warps": 4}


def programs(rows: int, columns: int, direction: str, device: torch.device) -> tuple[int, int]:
    """(programs down the rows, column blocks); fixed for a shape, so sums never reorder."""
    shape = config(columns)
    blocks = cdiv(columns, shape["BLOCK_N"])
    tiles = cdiv(rows, shape["BLOCK_R"])
    if device.type != "cuda":  # the interpreter
        return min(tiles, 2), blocks
    return min(tiles, max(processors(device) * (WARPS_PER_SM[direction] // shape["num_warps"]) // blocks, 1)), blocks


@triton.jit
def normal_cdf(b_x):
    """(Φ(x), exp(−x²/2)), with Abramowitz and Stegun's formula 7.1.26: within 8e-8, a float32 rounding.

    One exponential serves both, which makes the backward pass wait for memory only; erf would not.
    """
    b_exp = tl.exp2(b_x * b_x * (-0.5 * LOG2E))
    b_t = 1.0 / (1.0 + (0.3275911 * 0.7071067811865476) * tl.abs(b_x))
    b_poly = ((((1.061405429 * b_t - 1.453152027) * b_t + 1.421413741) * b_t - 0.284496736) * b_t
              + 0.254829592) * b_t
    b_tail = 0.5 * b_poly * b_exp
    return tl.where(b_x < 0, b_tail, 1.0 - b_tail), b_exp


@triton.jit(do_not_specialize=["rows"])
def gelu_forward(
    p_x,  # (rows, N)
    p_bias,  # (N,) or None
    p_out,  # (rows, N), out
    rows,
    N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):
    o_r = tl.arange(0, BLOCK_R)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_tile = o_r[:, None] * N + o_n[None, :]
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_n, mask=m_n, other=0).to(tl.float32)[None, :]
    for i_row in tl.range(tl.program_id(0) * BLOCK_R, rows, tl.num_programs(0) * BLOCK_R, num_stages=STAGES):
        o_base = tl.cast(i_row, tl.int64) * N
        m_tile = (i_row + o_r < rows)[:, None] & m_n[None, :]
        b_x = tl.load(p_x + o_base + o_tile, mask=m_tile, other=0).to(tl.float32)
        if p_bias is not None:
            b_x += b_bias
        b_cdf, _ = normal_cdf(b_x)
        tl.store(p_out + o_base + o_tile, (b_x * b_cdf).to(p_out.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["rows"])
def gelu_backward(
    p_grad,  # (rows, N)
    p_x,  # (rows, N)
    p_bias,  # (N,) or None
    p_dx,  # (rows, N), out
    p_out,  # (rows, N), out: the GELU again; None where nobody wants it
    p_partial,  # (programs, N) fp32, out: d bias; None without bias
    rows,
    N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):
    o_r = tl.arange(0, BLOCK_R)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_tile = o_r[:, None] * N + o_n[None, :]
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_n, mask=m_n, other=0).to(tl.float32)[None, :]
    b_sum = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for i_row in tl.range(tl.program_id(0) * BLOCK_R, rows, tl.num_programs(0) * BLOCK_R, num_stages=STAGES):
        o_base = tl.cast(i_row, tl.int64) * N
        m_tile = (i_row + o_r < rows)[:, None] & m_n[None, :]
        b_x = tl.load(p_x + o_base + o_tile, mask=m_tile, other=0).to(tl.float32)
        b_grad = tl.load(p_grad + o_base + o_tile, mask=m_tile, other=0).to(tl.float32)
        if p_bias is not None:
            b_x += b_bias
        b_cdf, b_exp = normal_cdf(b_x)
        if p_out is not None:
            tl.store(p_out + o_base + o_tile, (b_x * b_cdf).to(p_out.dtype.element_ty), mask=m_tile)
        b_grad *= b_cdf + b_x * b_exp * 0.3989422804014327
        tl.store(p_dx + o_base + o_tile, b_grad.to(p_dx.dtype.element_ty), mask=m_tile)
        b_sum += b_grad
    if p_partial is not None:
        tl.store(p_partial + tl.program_id(0) * N + o_n, tl.sum(b_sum, 0), mask=m_n)


def forward(x: Tensor, bias: Tensor | None) -> Tensor:
    """Launch the forward kernel; argument and result as the op ``fastmim::gelu``."""
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    columns = x.shape[-1]
    rows = x.numel() // columns
    out = torch.empty_like(x)
    gelu_forward.run(x, bias, out, rows, N=columns, **config(columns),
                     grid=programs(rows, columns, "forward", x.device), warmup=False)
    return out


def backward(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel; arguments and results as the op ``fastmim::gelu_backward``."""
    return _launch(grad, x, bias, None, bias is not None)


def backward_and_output(grad: Tensor, x: Tensor, sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(d x, with ``sums`` that of its rows in fp32 or else empty, GELU(x)) of (…, N) grad and x, in one pass."""
    out = torch.empty_like(grad)
    return *_launch(grad, x, None, out, sums), out


def _launch(grad: Tensor, x: Tensor, bias: Tensor | None, out: Tensor | None, sums: bool) -> tuple[Tensor, Tensor]:
    grad, x, bias = grad.contiguous(), x.contiguous(), None if bias is None else bias.contiguous()
    columns = x.shape[-1]
    rows = x.numel() // columns
    dx = torch.empty_like(x)
    grid = programs(rows, columns, "backward", x.device)
    partial = torch.empty(grid[0], columns, dtype=torch.float32, device=x.device) if sums else None
    gelu_backward.run(grad, x, bias, dx, out, partial, rows, N=columns, **config(columns), grid=grid, warmup=False)
    return dx, nothing(x, torch.float32) if partial is None else partial.sum(0)


def _trips(a: Mapping[str, Any]) -> tuple[float, ...]:
    """Tiles of rows that a program walks over."""
    return (a["rows"] / a["BLOCK_R"] / a["grid"][0],)


def _case(name: str, columns: int, direction: str, dtype: str, quick: bool, again: bool = False) -> AotCase:
    kernel = gelu_forward if direction == "forward" else gelu_backward
    signature = {n: "*fp32" if n in ("p_bias", "p_partial") else "i32" if n == "rows" else f"*{dtype}"
                 for n in kernel.arg_names if n.startswith("p_") or n == "rows"}
    shape: dict[str, Any] = config(columns) | {"N": columns}
    warps = shape.pop("num_warps")
    if direction == "backward":
        # Behind a product the output is wanted too, and the bias is part of the input.
        absent = "p_bias" if again else "p_out"
        del signature[absent]
        shape[absent] = None
    return AotCase(f"gelu/{direction}{'-again' * again}/{name}-{dtype}-n{columns}", kernel, signature, shape,
                   num_warps=warps, divisible=tuple(signature), quick=quick, trips=_trips)


def aot_cases() -> list[AotCase]:
    """Hidden widths of the first and last stage of the shipped encoders (MLP ratio 4)."""
    bases = {"swin_b": 128, "swin_l": 192, "swinv2_h": 352, "swinv2_g": 512}
    cases = [_case(name, 4 * base * width, direction, "bf16", quick=name == "swinv2_h" and width == 1)
             for name, base in bases.items() for width in (1, 8) for direction in ("forward", "backward")]
    cases += [_case(name, 32 * base, "backward", "bf16", quick=name == "swinv2_h", again=True)
              for name, base in bases.items()]
    return cases + [_case("swin_b", 512, direction, "fp32", False) for direction in ("forward", "backward")]
