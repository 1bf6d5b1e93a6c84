"""Triton kernels of ``patch_merge``: gather of 2×2 tokens with or without LayerNorm, forward and backward.

A tile holds some merged tokens with their four parts as (rows, 4, C), so that an access never crosses from
one source token into the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import arrival
from ..common.aot_case import AotCase
from ..common.arrival import GROUP, sum_partials
from ..common.device import processors
from ..common.sizes import cdiv, next_power_of_2

ELEMENTS_PER_THREAD = 8
"""One 128-bit access of bf16 a tensor."""
WARPS_PER_SM = {"forward": 24, "backward": 12}
"""What the registers allow at once; more programs would come as a second, nearly empty wave."""


@lru_cache(maxsize=256)
def config(channels: int, norm: bool) -> dict[str, int]:
    """Merged tokens a tile (``BLOCK_R``) and channels of each part (``BLOCK_C``) for C = ``channels``.

    A norm needs whole rows; without one wide rows are cut, so that four warps do. The same for every
    architecture and dtype: there is no dot, and the limit is the memory.
    """
    block_c = max(next_power_of_2(channels), 16)
    if not norm:
        block_c = next((b for b in (256, 128, 64) if channels % b == 0), min(block_c, 256))
    # A wide row has 16 values a thread: with 8 the compiler leaves it 64 registers on sm_90, which spill.
    num_warps = min(max(4 * block_c // (64 * ELEMENTS_PER_THREAD), 4), 8)
    block_r = max(32 * num_warps * ELEMENTS_PER_THREAD // (4 * block_c), 1)
    return {"BLOCK_R": block_r, "BLOCK_C": block_c, "STAGES": 2, "num_warps": num_warps}


def programs(rows: int, channels: int, norm: bool, direction: str, device: torch.device) -> tuple[int, int]:
    """(programs down the rows, column blocks); fixed for a shape, so sums never reorder."""
    shape = config(channels, norm)
    blocks = cdiv(channels, shape["BLOCK_C"])
    tiles = cdiv(rows, shape["BLOCK_R"])
    if device.type != "cuda":  # the interpreter
        return min(tiles, 2), blocks
    resident = processors(device) * cdiv(WARPS_PER_SM[direction], shape["num_warps"])
    return min(tiles, max(resident // blocks, 1)), blocks


def registers(channels: int, dtype: torch.dtype) -> int:
    """At most, of a thread of backward with a norm for maps in ``dtype``: Triton 3.6 takes fewer, and spills."""
    return 128 if config(channels, True)["num_warps"] == 8 and dtype.itemsize == 2 else 160


@triton.jit
def _source(o_row, m_row, height, width, C: tl.constexpr):
    """Element offsets (rows, 4, 1) of the four parts of merged tokens in (B, H, W, C), and which exist."""
    o_part = tl.arange(0, 4)
    columns = (width + 1) // 2
    o_line = o_row // columns  # of merged tokens, over the whole batch
    lines = (height + 1) // 2
    o_image = o_line // lines
    # Parts come column by column: (0, 0), (1, 0), (0, 1), (1, 1).
    o_y = (2 * (o_line - o_image * lines))[:, None] + (o_part % 2)[None, :]
    o_x = (2 * (o_row - o_line * columns))[:, None] + (o_part // 2)[None, :]
    m_part = m_row[:, None] & (o_y < height) & (o_x < width)
    o_token = (o_image.to(tl.int64)[:, None] * height + o_y) * width + o_x
    return (o_token * C)[:, :, None], m_part[:, :, None]


@triton.jit(do_not_specialize=["rows", "height", "width"])
def patch_merge_forward(
    p_x,  # (B, H, W, C)
    p_weight,  # (4C,) or None: no norm
    p_bias,  # (4C,) or None
    p_out,  # (rows, 4C), out; rows = B·⌈H/2⌉·⌈W/2⌉
    p_mean,  # (rows,) fp32 or None, out
    p_rstd,  # (rows,) fp32 or None, out
    rows, height, width, eps,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):
    o_r = tl.arange(0, BLOCK_R)
    o_c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, None, :]
    m_c = o_c < C
    o_channel = (tl.arange(0, 4) * C)[None, :, None] + o_c
    if p_weight is not None:
        b_weight = tl.load(p_weight + o_channel, mask=m_c, other=0).to(tl.float32)
        b_bias = tl.load(p_bias + o_channel, mask=m_c, other=0).to(tl.float32)
    for i_row in tl.range(tl.program_id(0) * BLOCK_R, rows, tl.num_programs(0) * BLOCK_R, num_stages=STAGES):
        m_row = i_row + o_r < rows
        o_source, m_source = _source(i_row + o_r, m_row, height, width, C)
        b_x = tl.load(p_x + o_source + o_c, mask=m_source & m_c, other=0)
        if p_weight is not None:
            b_x = b_x.to(tl.float32)
            b_mean = tl.sum(tl.sum(b_x, 2), 1) / (4 * C)
            b_x = tl.where(m_c, b_x - b_mean[:, None, None], 0)
            b_rstd = tl.rsqrt(tl.sum(tl.sum(b_x * b_x, 2), 1) / (4 * C) + eps)
            tl.store(p_mean + i_row + o_r, b_mean, mask=m_row)
            tl.store(p_rstd + i_row + o_r, b_rstd, mask=m_row)
            b_x = b_x * b_rstd[:, None, None] * b_weight + b_bias
        o_out = tl.cast(i_row, tl.int64) * (4 * C) + o_r[:, None, None] * (4 * C) + o_channel
        tl.store(p_out + o_out, b_x.to(p_out.dtype.element_ty), mask=m_row[:, None, None] & m_c)


@triton.jit(do_not_specialize=["rows", "height", "width"])
def patch_merge_backward(
    p_grad,  # (rows, 4C); rows = B·⌈H/2⌉·⌈W/2⌉
    p_x,  # (B, H, W, C) or None: no norm
    p_mean,  # (rows,) fp32 or None
    p_rstd,  # (rows,) fp32 or None
    p_weight,  # (4C,) or None
    p_dx,  # (B, H, W, C), out
    p_partial,  # (programs, 2, 4C) fp32 or None, scratch
    p_counter,  # int32 or None, see .arrival
    p_sums,  # (2, 4C) fp32 or None, out: d weight, d bias
    rows, height, width,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr,
):
    o_r = tl.arange(0, BLOCK_R)
    o_c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, None, :]
    m_c = o_c < C
    o_channel = (tl.arange(0, 4) * C)[None, :, None] + o_c
    if p_weight is not None:
        b_weight = tl.load(p_weight + o_channel, mask=m_c, other=0).to(tl.float32)
        b_d_weight = tl.zeros((BLOCK_R, 4, BLOCK_C), tl.float32)
        b_d_bias = tl.zeros((BLOCK_R, 4, BLOCK_C), tl.float32)
    for i_row in tl.range(tl.program_id(0) * BLOCK_R, rows, tl.num_programs(0) * BLOCK_R, num_stages=STAGES):
        m_row = i_row + o_r < rows
        o_source, m_source = _source(i_row + o_r, m_row, height, width, C)
        o_grad = tl.cast(i_row, tl.int64) * (4 * C) + o_r[:, None, None] * (4 * C) + o_channel
        b_grad = tl.load(p_grad + o_grad, mask=m_row[:, None, None] & m_c, other=0)
        if p_weight is not None:
            b_x = tl.load(p_x + o_source + o_c, mask=m_source & m_c, other=0).to(tl.float32)
            b_mean = tl.load(p_mean + i_row + o_r, mask=m_row, other=0)[:, None, None]
            b_rstd = tl.load(p_rstd + i_row + o_r, mask=m_row, other=0)[:, None, None]
            b_grad = b_grad.to(tl.float32)
            b_x = (b_x - b_mean) * b_rstd
            b_d_weight += b_grad * b_x
            b_d_bias += b_grad
            b_grad *= b_weight
            b_along = tl.sum(tl.sum(b_grad * b_x, 2), 1)[:, None, None] / (4 * C)
            b_level = tl.sum(tl.sum(b_grad, 2), 1)[:, None, None] / (4 * C)
            b_grad = (b_grad - b_x * b_along - b_level) * b_rstd
        tl.store(p_dx + o_source + o_c, b_grad.to(p_dx.dtype.element_ty), mask=m_source & m_c)
    if p_weight is not None:
        p_sum = p_partial + tl.program_id(0) * (8 * C) + o_channel
        tl.store(p_sum, tl.sum(b_d_weight, 0)[None, :, :], mask=m_c)
        tl.store(p_sum + 4 * C, tl.sum(b_d_bias, 0)[None, :, :], mask=m_c)
        sum_partials(p_partial, p_counter, p_sums, tl.program_id(0), tl.num_programs(0), 8 * C, GROUP)


def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
            ) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel; arguments and results as the op ``fastmim::patch_merge``."""
    x = x.contiguous()
    weight, bias = (None if v is None else v.contiguous() for v in (weight, bias))
    batch, height, width, channels = x.shape
    merged = (batch, (height + 1) // 2, (width + 1) // 2, 4 * channels)
    out = torch.empty(merged, dtype=out_dtype, device=x.device)
    rows, norm = out.numel() // (4 * channels), weight is not None
    mean, rstd = (torch.empty(rows if norm else 0, dtype=torch.float32, device=x.device) for _ in range(2))
    patch_merge_forward.run(
        x, weight, bias, out, mean if norm else None, rstd if norm else None, rows, height, width, eps,
        C=channels, **config(channels, norm), grid=programs(rows, channels, norm, "forward", x.device), warmup=False)
    return out, mean, rstd


def backward(grad: Tensor, x: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor | None, height: int,
             width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel; arguments and results as the op ``fastmim::patch_merge_backward``."""
    grad = grad.contiguous()
    x, weight = (None if t is None else t.contiguous() for t in (x, weight))
    channels = grad.shape[-1] // 4
    dx = torch.empty((grad.shape[0], height, width, channels), dtype=dtype, device=grad.device)
    rows, norm = grad.numel() // (4 * channels), weight is not None
    grid = programs(rows, channels, norm, "backward", grad.device)
    partial = torch.empty(grid[0] if norm else 0, 2, 4 * channels, dtype=torch.float32, device=grad.device)
    sums = torch.empty((2, 4 * channels) if norm else (0,), dtype=torch.float32, device=grad.device)
    needed = (partial, arrival.counters(1 + grid[0], grad.device), sums) if norm else (None,) * 3
    patch_merge_backward.run(
        grad, x, mean if norm else None, rstd if norm else None, weight, dx, *needed, rows, height, width, C=channels,
        GROUP=GROUP, maxnreg=registers(channels, dtype) if norm else None, **config(channels, norm),
        grid=grid, warmup=False)
    return dx, sums


def _trips(a: Mapping[str, Any]) -> tuple[float, ...]:
    """Tiles of rows that a program walks over."""
    return (a["rows"] / a["BLOCK_R"] / a["grid"][0],)


def _case(name: str, channels: int, norm: bool, stream: str, direction: str, quick: bool) -> AotCase:
    kernel = patch_merge_forward if direction == "forward" else patch_merge_backward
    types = {"p_x": f"*{stream}", "p_dx": f"*{stream}", "p_out": "*bf16", "p_grad": "*bf16", "p_counter": "*i32",
             "rows": "i32", "height": "i32", "width": "i32", "eps": "fp32"}
    absent = set() if norm else {"p_weight", "p_bias", "p_mean", "p_rstd", "p_partial", "p_counter", "p_sums"}
    absent |= {"p_x"} if direction == "backward" and not norm else set()
    signature = {n: types.get(n, "*fp32") for n in kernel.arg_names
                 if (n.startswith("p_") or n in types) and n not in absent}
    shape: dict[str, Any] = {**config(channels, norm), **({"GROUP": GROUP} if direction == "backward" else {})}
    warps = shape.pop("num_warps")
    limit = registers(channels, torch.bfloat16 if stream == "bf16" else torch.float32)
    return AotCase(f"patch_merge/{direction}/{name}-{stream}-c{channels}", kernel, signature,
                   {"C": channels, **shape, **{n: None for n in absent if n in kernel.arg_names}},
                   num_warps=warps, divisible=tuple(n for n in signature if n.startswith("p_")), quick=quick,
                   maxnreg=limit if norm and direction == "backward" else None, persistent=norm, trips=_trips)


def aot_cases() -> list[AotCase]:
    """The three mergings of the shipped encoders, from a float32 and a bf16 stream to bf16."""
    bases = (("swin_b", 128, True), ("swin_l", 192, True), ("swinv2_b", 128, False), ("swinv2_l", 192, False),
             ("swinv2_h", 352, False), ("swinv2_g", 512, False))
    return [_case(name, base * 2**stage, norm, stream, direction,
                  quick=name in ("swin_l", "swinv2_h") and stage == 2 and stream == "fp32")
            for name, base, norm in bases for stage in range(3) for stream in ("fp32", "bf16")
            for direction in ("forward", "backward")]
