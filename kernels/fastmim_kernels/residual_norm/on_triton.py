"""Triton kernels of ``residual_norm``: one pass over the rows forward, one backward, both persistent.

A program walks over tiles of whole rows, so that the (C,) vectors are read, and the (C,) gradient partials
written, once a program. The last programs add the partials in a fixed order: gradients are bitwise repeatable.
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
from ..common.rows import nothing
from ..common.sizes import cdiv, next_power_of_2
from .layout import given, merged_shape, owned, written

ELEMENTS_PER_THREAD = 8
"""One 128-bit access of bf16: 16 and more warps stay resident beside three sums a column in registers."""
WARPS_PER_SM = {"forward": 24, "backward": 16}
"""What the registers allow at once; more programs than that would come as a second, nearly empty wave."""


@lru_cache(maxsize=256)
def config(channels: int) -> dict[str, int]:
    """``BLOCK_R`` rows a tile, ``BLOCK_C`` columns (all of them) and ``num_warps`` for C = ``channels``.

    The same for every architecture and dtype: there is no dot, and the limit is the memory. Two stages load
    the next tile while this one is reduced.
    """
    block_c = max(next_power_of_2(channels), 16)
    num_warps = min(max(block_c // (32 * ELEMENTS_PER_THREAD), 4), 16)
    block_r = max(32 * num_warps * ELEMENTS_PER_THREAD // block_c, 1)
    return {"BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": num_warps, "STAGES": 2}


def programs(tiles: int, num_warps: int, direction: str, device: torch.device) -> int:
    """Programs of a persistent launch: fills the device, and is fixed for a shape, so sums never reorder."""
    if device.type != "cuda":  # the interpreter
        return min(tiles, 2)
    return min(tiles, processors(device) * max(WARPS_PER_SM[direction] // num_warps, 1))


@lru_cache(maxsize=1024)
def launch(rows: int, channels: int, direction: str, device: torch.device) -> tuple[int, dict[str, int]]:
    """(programs, :func:`config`)."""
    shape = config(channels)
    return programs(cdiv(rows, shape["BLOCK_R"]), shape["num_warps"], direction, device), shape


@triton.jit
def _stream(i_row, o_r, o_c, height, width, MERGE: tl.constexpr, C: tl.constexpr):
    """Offsets (rows, C) of rows of the new stream; merged, four neighbours lie behind each other as one row of 4C."""
    if MERGE:
        i_token = i_row + o_r
        i_x = i_token % width
        i_line = i_token // width
        # Height and width are even: a pair of lines never spans two images. Parts come column by column.
        i_row_out = ((i_line // 2) * (width // 2) + i_x // 2) * 4 + (i_x % 2) * 2 + i_line % 2
        offset = i_row_out.to(tl.int64)[:, None] * C + o_c[None, :]
    else:
        offset = tl.cast(i_row, tl.int64) * C + o_r[:, None] * C + o_c[None, :]
    return offset


@triton.jit(do_not_specialize=["rows", "rows_per_sample", "height", "width"])
def residual_norm_forward(
    p_residual,  # (rows, C) or None ("post"): zero
    p_branch,  # (rows, C) or None ("pre"): zero
    p_weight,  # (C,)
    p_bias,  # (C,)
    p_branch_bias,  # (C,) or None
    p_gamma,  # (C,) or None
    p_scale,  # (samples,) or None
    p_added,  # (rows, C) or None, out: the new residual stream; None: it is p_residual
    p_out,  # (rows, C) or None, out: what the next product reads
    p_mean,  # (rows,) fp32, out
    p_rstd,  # (rows,) fp32, out
    rows, rows_per_sample, eps, height, width,
    POST: tl.constexpr, MERGE: tl.constexpr, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    o_r = tl.arange(0, BLOCK_R)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_tile = o_r[:, None] * C + o_c[None, :]
    b_weight = tl.load(p_weight + o_c, mask=m_c, other=0).to(tl.float32)[None, :]
    b_bias = tl.load(p_bias + o_c, mask=m_c, other=0).to(tl.float32)[None, :]
    if p_branch_bias is not None:
        b_branch_bias = tl.load(p_branch_bias + o_c, mask=m_c, other=0).to(tl.float32)[None, :]
    if p_gamma is not None:
        b_gamma = tl.load(p_gamma + o_c, mask=m_c, other=0).to(tl.float32)[None, :]
    for i_row in tl.range(tl.program_id(0) * BLOCK_R, rows, tl.num_programs(0) * BLOCK_R, num_stages=STAGES):
        o_base = tl.cast(i_row, tl.int64) * C
        m_r = i_row + o_r < rows
        m_tile = m_r[:, None] & m_c[None, :]
        if p_residual is not None:
            b_residual = tl.load(p_residual + o_base + o_tile, mask=m_tile, other=0).to(tl.float32)
        if p_branch is not None:
            b_branch = tl.load(p_branch + o_base + o_tile, mask=m_tile, other=0).to(tl.float32)
            if p_branch_bias is not None:
                b_branch += b_branch_bias
            if p_gamma is not None:
                b_branch *= b_gamma
        if POST:
            b_x = b_branch
        elif p_branch is None:
            b_x = b_residual
        else:
            if p_scale is not None:
                b_branch *= tl.load(p_scale + (i_row + o_r) // rows_per_sample, mask=m_r, other=0)[:, None]
            # Statistics of the stored value: the backward pass sees no other.
            b_added = (b_residual + b_branch).to(p_added.dtype.element_ty)
            tl.store(p_added + o_base + o_tile, b_added, mask=m_tile)
            b_x = b_added.to(tl.float32)
        b_mean = tl.sum(tl.where(m_c[None, :], b_x, 0), 1) / C
        b_centred = tl.where(m_c[None, :], b_x - b_mean[:, None], 0)
        b_rstd = tl.rsqrt(tl.sum(b_centred * b_centred, 1) / C + eps)
        tl.store(p_mean + i_row + o_r, b_mean, mask=m_r)
        tl.store(p_rstd + i_row + o_r, b_rstd, mask=m_r)
        b_norm = b_centred * b_rstd[:, None] * b_weight + b_bias
        if POST:
            if p_scale is not None:
                b_norm *= tl.load(p_scale + (i_row + o_r) // rows_per_sample, mask=m_r, other=0)[:, None]
            if p_residual is not None:
                b_norm += b_residual
            p_new = p_added + _stream(i_row, o_r, o_c, height, width, MERGE, C)
            tl.store(p_new, b_norm.to(p_added.dtype.element_ty), mask=m_tile)
        if p_out is not None:
            tl.store(p_out + o_base + o_tile, b_norm.to(p_out.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["rows", "rows_per_sample", "height", "width"])
def residual_norm_backward(
    p_grad_added,  # (rows, C) or None
    p_grad_out,  # (rows, C) or None
    p_saved,  # (rows, C): the branch ("post") or the new residual ("pre")
    p_branch,  # (rows, C) or None: the branch ("pre" with gamma)
    p_mean,  # (rows,) fp32
    p_rstd,  # (rows,) fp32
    p_weight,  # (C,)
    p_branch_bias,  # (C,) or None
    p_gamma,  # (C,) or None
    p_scale,  # (samples,) or None
    p_d_residual,  # (rows, C) or None, out; None ("post"): it is grad_added, or nobody wants it
    p_d_branch,  # (rows, C) or None, out; None ("pre"): it is d_residual
    p_partial,  # (programs, SUMS, C) fp32, scratch
    p_counter,  # int32, see .arrival
    p_sums,  # (SUMS, C) fp32, out: d weight, d bias, d branch_bias, d gamma
    rows, rows_per_sample, height, width,
    POST: tl.constexpr, MERGE: tl.constexpr, SUMS: tl.constexpr, C: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr,
):
    o_r = tl.arange(0, BLOCK_R)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_tile = o_r[:, None] * C + o_c[None, :]
    b_weight = tl.load(p_weight + o_c, mask=m_c, other=0).to(tl.float32)[None, :]
    if p_branch_bias is not None:
        b_branch_bias = tl.load(p_branch_bias + o_c, mask=m_c, other=0).to(tl.float32)[None, :]
        b_d_branch_bias = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    if p_gamma is not None:
        b_gamma = tl.load(p_gamma + o_c, mask=m_c, other=0).to(tl.float32)[None, :]
        b_d_gamma = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    b_d_weight = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    b_d_bias = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i_row in tl.range(tl.program_id(0) * BLOCK_R, rows, tl.num_programs(0) * BLOCK_R, num_stages=STAGES):
        o_base = tl.cast(i_row, tl.int64) * C
        m_r = i_row + o_r < rows
        m_tile = m_r[:, None] & m_c[None, :]
        b_x = tl.load(p_saved + o_base + o_tile, mask=m_tile, other=0).to(tl.float32)
        b_g = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        if p_grad_out is not None:
            b_g += tl.load(p_grad_out + o_base + o_tile, mask=m_tile, other=0).to(tl.float32)
        if p_grad_added is not None:
            p_new = p_grad_added + _stream(i_row, o_r, o_c, height, width, MERGE, C)
            b_grad_added = tl.load(p_new, mask=m_tile, other=0).to(tl.float32)
        b_mean = tl.load(p_mean + i_row + o_r, mask=m_r, other=0)[:, None]
        b_rstd = tl.load(p_rstd + i_row + o_r, mask=m_r, other=0)[:, None]
        if p_scale is not None:
            b_scale = tl.load(p_scale + (i_row + o_r) // rows_per_sample, mask=m_r, other=0)[:, None]
        if POST:
            if p_grad_added is not None:
                b_g += b_grad_added
            if p_d_residual is not None:
                tl.store(p_d_residual + o_base + o_tile, b_g.to(p_d_residual.dtype.element_ty), mask=m_tile)
            if p_scale is not None:
                b_g *= b_scale
            if p_branch_bias is not None:
                b_x += b_branch_bias
        b_x = (b_x - b_mean) * b_rstd
        b_d_weight += b_g * b_x
        b_d_bias += b_g
        b_g *= b_weight
        b_along = tl.sum(b_g * b_x, 1)[:, None] / C
        b_level = tl.sum(b_g, 1)[:, None] / C
        b_g = (b_g - b_x * b_along - b_level) * b_rstd
        if not POST:
            if p_grad_added is not None:
                b_g += b_grad_added
            tl.store(p_d_residual + o_base + o_tile, b_g.to(p_d_residual.dtype.element_ty), mask=m_tile)
            if p_scale is not None:
                b_g *= b_scale
            if p_gamma is not None:
                b_branch = tl.load(p_branch + o_base + o_tile, mask=m_tile, other=0).to(tl.float32)
                if p_branch_bias is not None:
                    b_branch += b_branch_bias
                b_d_gamma += tl.where(m_r[:, None], b_g * b_branch, 0)
                b_g *= b_gamma
        if p_d_branch is not None:
            tl.store(p_d_branch + o_base + o_tile, b_g.to(p_d_branch.dtype.element_ty), mask=m_tile)
        if p_branch_bias is not None:
            b_d_branch_bias += tl.where(m_r[:, None], b_g, 0)
    p_sum = p_partial + tl.program_id(0) * (SUMS * C) + o_c
    tl.store(p_sum, tl.sum(b_d_weight, 0), mask=m_c)
    tl.store(p_sum + C, tl.sum(b_d_bias, 0), mask=m_c)
    if p_branch_bias is not None:
        tl.store(p_sum + 2 * C, tl.sum(b_d_branch_bias, 0), mask=m_c)
    if p_gamma is not None:
        tl.store(p_sum + (SUMS - 1) * C, tl.sum(b_d_gamma, 0), mask=m_c)
    sum_partials(p_partial, p_counter, p_sums, tl.program_id(0), tl.num_programs(0), SUMS * C, GROUP)


def forward(residual: Tensor | None, branch: Tensor | None, weight: Tensor, bias: Tensor,
            branch_bias: Tensor | None, drop_scale: Tensor | None, gamma: Tensor | None, order: str, eps: float,
            stream_dtype: torch.dtype, out_dtype: torch.dtype, merge: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward kernel; arguments and results as the op ``fastmim::residual_norm``."""
    residual = None if residual is None else residual.contiguous()
    branch = None if branch is None else branch.contiguous()
    like = given(residual, branch)
    full, device = like.shape, like.device
    channels, (height, width) = full[-1], full[1:3] if merge else (0, 0)
    rows = like.numel() // channels
    own_added, own_out = written(order, branch, stream_dtype, out_dtype)
    shape_added = merged_shape(like) if merge else full
    added = torch.empty(shape_added, dtype=stream_dtype, device=device) if own_added else None
    out = torch.empty(full, dtype=out_dtype, device=device) if own_out else None
    mean = torch.empty(rows, dtype=torch.float32, device=device)
    rstd = torch.empty_like(mean)
    count, shape = launch(rows, channels, "forward", device)
    residual_norm_forward.run(
        residual, branch, weight.contiguous(), bias.contiguous(),
        None if branch_bias is None else branch_bias.contiguous(), None if gamma is None else gamma.contiguous(),
        None if drop_scale is None else drop_scale.contiguous(), added, out, mean, rstd, rows, rows // full[0], eps,
        height, width, POST=order == "post", MERGE=merge, C=channels, **shape, grid=(count,), warmup=False)
    return (nothing(like, stream_dtype) if added is None else added, nothing(like, out_dtype) if out is None else out,
            mean, rstd)


def backward(grad_added: Tensor | None, grad_out: Tensor | None, saved: Tensor, branch: Tensor | None,
             mean: Tensor, rstd: Tensor, weight: Tensor, branch_bias: Tensor | None,
             drop_scale: Tensor | None, gamma: Tensor | None, order: str, merge: bool, dtype: torch.dtype | None,
             branch_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernel; arguments and results as the op ``fastmim::residual_norm_backward``."""
    grad_added = None if grad_added is None else grad_added.contiguous()
    grad_out = None if grad_out is None else grad_out.contiguous()
    branch, saved = None if branch is None else branch.contiguous(), saved.contiguous()
    full, device = saved.shape, saved.device
    channels, (height, width) = full[-1], full[1:3] if merge else (0, 0)
    rows = saved.numel() // channels
    own_residual, own_branch = owned(order, merge, grad_out, drop_scale, gamma, dtype, branch_dtype)
    d_residual = torch.empty_like(saved, dtype=dtype) if own_residual else None
    d_branch = torch.empty_like(saved, dtype=branch_dtype) if own_branch else None
    count, shape = launch(rows, channels, "backward", device)
    vectors_summed = 2 + (branch_bias is not None) + (gamma is not None)
    sums = torch.empty(vectors_summed, channels, dtype=torch.float32, device=device)
    partial = torch.empty(count, vectors_summed, channels, dtype=torch.float32, device=device)
    residual_norm_backward.run(
        grad_added, grad_out, saved, branch, mean, rstd, weight.contiguous(),
        None if branch_bias is None else branch_bias.contiguous(), None if gamma is None else gamma.contiguous(),
        None if drop_scale is None else drop_scale.contiguous(), d_residual, d_branch, partial,
        arrival.counters(1 + count, device), sums, rows, rows // full[0], height, width, POST=order == "post",
        MERGE=merge, SUMS=vectors_summed, C=channels, GROUP=GROUP, **shape, grid=(count,), warmup=False)
    return (nothing(saved, dtype) if d_residual is None else d_residual,
            nothing(saved, branch_dtype) if d_branch is None else d_branch, sums)


def _trips(a: Mapping[str, Any]) -> tuple[float, ...]:
    """Tiles of rows that a program walks over."""
    return (a["rows"] / a["BLOCK_R"] / a["grid"][0],)


_BLOCKS = (("swin_b", "pre", 128), ("swinv2_b", "post", 128), ("swinv2_l", "post", 192),
           ("swinv2_h", "post", 352), ("swinv2_g", "post", 512))


def _case(name: str, order: str, channels: int, stream: str, direction: str, quick: bool, merge: bool = False
          ) -> AotCase:
    kernel = residual_norm_forward if direction == "forward" else residual_norm_backward
    shape = config(channels)
    post = order == "post"
    wide, narrow = f"*{stream}", "*bf16"
    second = None if post and stream == "bf16" else narrow
    types: dict[str, str | None] = {
        "p_residual": wide, "p_branch": narrow, "p_weight": "*fp32", "p_bias": "*fp32", "p_branch_bias": "*fp32",
        "p_gamma": None, "p_scale": "*fp32", "p_added": wide, "p_mean": "*fp32", "p_rstd": "*fp32", "p_out": second,
        "p_grad_added": wide, "p_grad_out": second, "p_saved": narrow if post else wide, "p_d_branch": narrow,
        "p_d_residual": wide if merge else second and wide, "p_partial": "*fp32", "p_counter": "*i32",
        "p_sums": "*fp32", "rows": "i32", "rows_per_sample": "i32",
        "height": "i32", "width": "i32", "eps": "fp32"}
    if direction == "backward":
        types["p_branch"] = None
    present = {n: t for n in kernel.arg_names if (t := types.get(n)) is not None}
    constexprs: dict[str, Any] = {n: None for n in kernel.arg_names if types.get(n, "") is None}
    constexprs |= {"POST": post, "MERGE": merge, "C": channels, **{k: v for k, v in shape.items() if k != "num_warps"}}
    if direction == "backward":
        constexprs |= {"SUMS": 3, "GROUP": GROUP}
    # Up to 256 channels the (C,) vectors and partials of a program are narrower than its threads' 128 bits.
    suffix = "-merge" * merge
    return AotCase(f"residual_norm/{direction}/{name}-{stream}-c{channels}{suffix}", kernel, present, constexprs,
                   num_warps=shape["num_warps"], divisible=tuple(n for n in present if n != "eps"), quick=quick,
                   wide_target=0.94 if channels <= 256 else 0.95, persistent=True, trips=_trips)


def aot_cases() -> list[AotCase]:
    """Every stage of the shipped encoders, with a float32 and a bf16 stream, branch and result in bf16."""
    cases = [_case(name, order, base * 2**stage, stream, direction,
                   quick=name in ("swin_b", "swinv2_g") and stage == 3 and stream == "fp32")
             for name, order, base in _BLOCKS for stage in range(4) for stream in ("fp32", "bf16")
             for direction in ("forward", "backward")]
    # SwinV2 ends a stage with a merged map.
    return cases + [_case(name, order, base * 2**stage, "bf16", direction, quick=name == "swinv2_h" and stage == 2,
                          merge=True)
                    for name, order, base in _BLOCKS[1:] for stage in range(3)
                    for direction in ("forward", "backward")]
