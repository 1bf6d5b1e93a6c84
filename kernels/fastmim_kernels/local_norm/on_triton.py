"""Sliding-window normalisation by running sums: a pass along the rows, then one down the columns.

A prefix sum of a whole line lives in registers; the sum of a window is the difference of two of its entries,
so that every pixel is loaded once per pass whatever the window. Values are taken relative to the first pixel
of their plane: differences of prefix sums of a flat plane are then exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot_case import AotCase
from ..common.sizes import cdiv, next_power_of_2

EPS = tl.constexpr(1e-6)


@triton.jit
def window_sum(b_x, o_n, size, R: tl.constexpr):
    """Sum of columns n − R … n + R of (LINES, N) values, zeros beyond ``size``."""
    b_prefix = tl.cumsum(b_x, 1)
    o_high = tl.minimum(o_n + R, size - 1)
    o_low = o_n - R - 1
    o_zero = tl.zeros(b_x.shape, tl.int32)
    b_high = tl.gather(b_prefix, o_zero + o_high[None, :], 1)
    b_low = tl.gather(b_prefix, o_zero + tl.maximum(o_low, 0)[None, :], 1)
    return b_high - tl.where(o_low >= 0, b_low, 0.0)


@triton.jit
def row_kernel(
    p_x,  # (planes, H, W) images
    p_sum,  # (planes, H, W) float32 window sums of x − pivot
    p_square,  # (planes, H, W) float32 window sums of (x − pivot)²
    height, width, R: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(height, LINES)
    i_plane = (tl.program_id(0) // blocks).to(tl.int64)
    i_y = tl.program_id(0) % blocks * LINES + tl.arange(0, LINES)
    o_x = tl.arange(0, BLOCK)
    o = (i_plane * height + i_y)[:, None] * width + o_x[None, :]
    m = (i_y < height)[:, None] & (o_x < width)[None, :]
    b_pivot = tl.load(p_x + i_plane * height * width).to(tl.float32)
    b_x = tl.where(m, tl.load(p_x + o, mask=m, other=0).to(tl.float32) - b_pivot, 0.0)
    tl.store(p_sum + o, window_sum(b_x, o_x, width, R), mask=m)
    tl.store(p_square + o, window_sum(b_x * b_x, o_x, width, R), mask=m)


@triton.jit
def column_kernel(
    p_x,  # (planes, H, W) images
    p_sum,  # (planes, H, W) float32
    p_square,  # (planes, H, W) float32
    p_out,  # (planes, H, W) float32
    height, width, R: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(width, LINES)
    i_plane = (tl.program_id(0) // blocks).to(tl.int64)
    i_x = tl.program_id(0) % blocks * LINES + tl.arange(0, LINES)
    o_y = tl.arange(0, BLOCK)
    # Lines are columns of the image: neighbours in memory lie along the first axis of the tile.
    o = (i_plane * height + o_y)[None, :] * width + i_x[:, None]
    m = (i_x < width)[:, None] & (o_y < height)[None, :]
    b_pivot = tl.load(p_x + i_plane * height * width).to(tl.float32)
    b_sum = window_sum(tl.load(p_sum + o, mask=m, other=0), o_y, height, R)
    b_square = window_sum(tl.load(p_square + o, mask=m, other=0), o_y, height, R)
    n_rows = tl.minimum(o_y + R, height - 1) - tl.maximum(o_y - R, 0) + 1
    n_cols = tl.minimum(i_x + R, width - 1) - tl.maximum(i_x - R, 0) + 1
    # Lanes outside the image have no window: any count but 0.
    b_n = tl.maximum(n_rows[None, :] * n_cols[:, None], 1).to(tl.float32)
    b_mean = b_sum / b_n
    b_var = (b_square / b_n - b_mean * b_mean) * (b_n / tl.maximum(b_n - 1, 1.0))
    b_x = tl.load(p_x + o, mask=m, other=0).to(tl.float32) - b_pivot
    tl.store(p_out + o, (b_x - b_mean) / tl.sqrt_rn(tl.maximum(b_var, 0.0) + EPS), mask=m)


def config(length: int, lines: int) -> dict[str, int]:
    """A tile of whole lines: about 2,048 values, and 4 neighbouring lines at least for 128-bit column accesses."""
    block = next_power_of_2(length)
    return {"BLOCK": block, "LINES": max(4, min(2048 // block, next_power_of_2(lines))), "num_warps": 4}


def forward(images: Tensor, kernel_size: int) -> Tensor:
    """Launch the kernels; arguments and result as the op ``fastmim::local_norm_target``."""
    images = images.contiguous()
    b, c, height, width = images.shape
    sums = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    squares = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    out = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    rows, cols = config(width, height), config(height, width)
    # Along x: the other two axes of a grid end at 65,535.
    row_kernel.run(
        images, sums, squares, height, width, R=kernel_size // 2, **rows,
        grid=(cdiv(height, rows["LINES"]) * b * c,), warmup=False)
    column_kernel.run(
        images, sums, squares, out, height, width, R=kernel_size // 2, **cols,
        grid=(cdiv(width, cols["LINES"]) * b * c,), warmup=False)
    return out


def aot_cases() -> list[AotCase]:
    """Window 47 on images of 192 and 224 pixels."""
    cases = []
    for size in (192, 224):
        cfg = config(size, size)
        constexprs = {"R": 23, "LINES": cfg["LINES"], "BLOCK": cfg["BLOCK"]}
        for name, kernel in (("rows", row_kernel), ("columns", column_kernel)):
            signature = {n: "*fp32" if n.startswith("p_") else "i32" for n in kernel.arg_names if n not in constexprs}
            cases.append(AotCase(f"{name}/{size}", kernel, signature, constexprs, cfg["num_warps"], 2,
                                 tuple(signature), quick=size == 192))
    return cases
