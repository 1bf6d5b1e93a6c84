"""Mask-token substitution with LayerNorm before and position embedding after.

A program owns a block of positions and walks through the images of the batch: parameters and position
embeddings are read once, their gradients are summed in registers and over the programs in a fixed order. The
tokens of masked patches are never loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import arrival
from ..common.aot_case import AotCase
from ..common.arrival import GROUP, sum_partials
from ..common.sizes import cdiv, next_power_of_2


@triton.jit(do_not_specialize=["batch", "per_program"])
def mask_tokens_forward(
    p_x,  # (B, P, C) tokens
    p_mask,  # (B, P) bool as uint8
    p_token,  # (C,)
    p_weight,  # (C,) or None
    p_bias,  # (C,) or None
    p_pos,  # (P, C) or None
    p_out,  # (B, P, C)
    p_mean,  # (B, P) float32, unused without norm
    p_rstd,  # (B, P) float32, unused without norm
    batch, positions, per_program, eps,
    C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    i_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c = tl.arange(0, BLOCK_C)
    m_p = i_p < positions
    m_c = o_c < C
    b_token = tl.load(p_token + o_c, mask=m_c, other=0).to(tl.float32)
    if p_weight is not None:
        b_w = tl.load(p_weight + o_c, mask=m_c, other=0).to(tl.float32)
        b_b = tl.load(p_bias + o_c, mask=m_c, other=0).to(tl.float32)
    if p_pos is not None:
        b_pos = tl.load(p_pos + i_p[:, None] * C + o_c, mask=m_p[:, None] & m_c, other=0).to(tl.float32)
    first = tl.program_id(1).to(tl.int64) * per_program
    for i_b in range(first, tl.minimum(first + per_program, batch)):
        i_row = i_b * positions + i_p
        b_hidden = tl.load(p_mask + i_row, mask=m_p, other=1) != 0
        o_x = i_row[:, None] * C + o_c
        b_x = tl.load(p_x + o_x, mask=(m_p & (b_hidden == 0))[:, None] & m_c, other=0).to(tl.float32)
        if p_weight is not None:
            b_mean = tl.sum(b_x, 1) / C
            b_d = tl.where(m_c, b_x - b_mean[:, None], 0.0)
            b_rstd = 1 / tl.sqrt_rn(tl.sum(b_d * b_d, 1) / C + eps)
            b_x = b_d * b_rstd[:, None] * b_w + b_b
            tl.store(p_mean + i_row, b_mean, mask=m_p)
            tl.store(p_rstd + i_row, b_rstd, mask=m_p)
        b_y = tl.where(b_hidden[:, None], b_token, b_x)
        if p_pos is not None:
            b_y += b_pos
        tl.store(p_out + o_x, b_y.to(p_out.dtype.element_ty), mask=m_p[:, None] & m_c)


@triton.jit(do_not_specialize=["batch", "per_program"])
def mask_tokens_backward(
    p_g,  # (B, P, C) gradient of the output
    p_more,  # (B, P, C) gradient from its second reader, or None
    p_x,  # (B, P, C) tokens, None without norm
    p_mask,  # (B, P) bool as uint8
    p_mean,  # (B, P) float32, unused without norm
    p_rstd,  # (B, P) float32, unused without norm
    p_weight,  # (C,) or None
    p_dx,  # (B, P, C)
    p_partial,  # (programs, K, C) float32, scratch
    p_counter,  # int32, see .arrival
    p_sums,  # (K, C) float32, out: d mask_token, then d weight and d bias with a norm
    p_dpos,  # (splits, P, C) float32 or None
    batch, positions, per_program,
    C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr,
):
    i_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c = tl.arange(0, BLOCK_C)
    m_p = i_p < positions
    m_c = o_c < C
    m_x = m_p[:, None] & m_c
    a_token = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    if p_weight is not None:
        b_w = tl.load(p_weight + o_c, mask=m_c, other=0).to(tl.float32)
        a_weight = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        a_bias = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    if p_dpos is not None:
        a_pos = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    i_split = tl.program_id(1).to(tl.int64)
    first = i_split * per_program
    for i_b in range(first, tl.minimum(first + per_program, batch)):
        i_row = i_b * positions + i_p
        b_hidden = tl.load(p_mask + i_row, mask=m_p, other=1) != 0
        o_x = i_row[:, None] * C + o_c
        b_g = tl.load(p_g + o_x, mask=m_x, other=0).to(tl.float32)
        if p_more is not None:
            b_g += tl.load(p_more + o_x, mask=m_x, other=0).to(tl.float32)
        a_token += tl.where(b_hidden[:, None], b_g, 0.0)
        if p_dpos is not None:
            a_pos += b_g
        b_dx = tl.where(b_hidden[:, None], 0.0, b_g)
        if p_weight is not None:
            m_seen = m_p & (b_hidden == 0)
            b_x = tl.load(p_x + o_x, mask=m_seen[:, None] & m_c, other=0).to(tl.float32)
            b_mean = tl.load(p_mean + i_row, mask=m_seen, other=0)
            b_rstd = tl.load(p_rstd + i_row, mask=m_seen, other=0)
            b_xhat = tl.where(m_c, (b_x - b_mean[:, None]) * b_rstd[:, None], 0.0)
            a_weight += b_dx * b_xhat
            a_bias += b_dx
            b_wg = b_dx * b_w
            b_dx = b_wg - tl.sum(b_wg, 1)[:, None] / C - b_xhat * (tl.sum(b_wg * b_xhat, 1)[:, None] / C)
            b_dx = tl.where(b_hidden[:, None], 0.0, b_dx * b_rstd[:, None])
        tl.store(p_dx + o_x, b_dx.to(p_dx.dtype.element_ty), mask=m_x)
    i_program = i_split * tl.num_programs(0) + tl.program_id(0)
    if p_dpos is not None:
        tl.store(p_dpos + (i_split * positions + i_p)[:, None] * C + o_c, a_pos, mask=m_x)
    if p_weight is not None:
        p_row = p_partial + i_program * 3 * C + o_c
        tl.store(p_row, tl.sum(a_token, 0), mask=m_c)
        tl.store(p_row + C, tl.sum(a_weight, 0), mask=m_c)
        tl.store(p_row + 2 * C, tl.sum(a_bias, 0), mask=m_c)
    else:
        tl.store(p_partial + i_program * C + o_c, tl.sum(a_token, 0), mask=m_c)
    programs = tl.num_programs(0) * tl.num_programs(1)
    sum_partials(p_partial, p_counter, p_sums, i_program, programs, C if p_weight is None else 3 * C, GROUP)


REGISTERS = 160
"""At most, of a thread of backward with a norm: three blocks fit. Triton 3.6 takes fewer by itself, and spills."""


def config(channels: int, positions: int, batch: int) -> dict[str, int]:
    """Tile and grid: about 2,048 values a tile (the accumulators of backward must fit in registers)."""
    block_c = next_power_of_2(channels)
    block_p = max(1, min(2048 // block_c, next_power_of_2(positions)))
    blocks = cdiv(positions, block_p)
    # Enough programs for 3 blocks on each of 132 SMs, but at least 8 images a program.
    splits = max(1, min(cdiv(396, blocks), batch // 8))
    per_program = cdiv(batch, splits)
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "per_program": per_program, "blocks": blocks,
            "splits": cdiv(batch, per_program), "num_warps": 4 if block_c * block_p <= 2048 else 8}


def forward(tokens: Tensor, mask: Tensor, mask_token: Tensor, weight: Tensor | None, bias: Tensor | None,
            pos_embed: Tensor | None, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel; arguments and results as the op ``fastmim::mask_tokens``."""
    tokens, mask = tokens.contiguous(), mask.contiguous()
    batch, height, width, c = tokens.shape
    cfg = config(c, height * width, batch)
    out = torch.empty(tokens.shape, dtype=out_dtype, device=tokens.device)
    shape = (batch, height, width) if weight is not None else (0,)
    mean = torch.empty(shape, dtype=torch.float32, device=tokens.device)
    rstd = torch.empty(shape, dtype=torch.float32, device=tokens.device)
    vectors = [None if v is None else v.contiguous() for v in (mask_token, weight, bias, pos_embed)]
    mask_tokens_forward.run(
        tokens, mask.view(torch.uint8), *vectors, out, mean, rstd,
        batch, height * width, cfg["per_program"], eps,
        C=c, BLOCK_P=cfg["BLOCK_P"], BLOCK_C=cfg["BLOCK_C"], num_warps=cfg["num_warps"],
        grid=(cfg["blocks"], cfg["splits"]), warmup=False)
    return out, mean, rstd


def backward(grad: Tensor, more: Tensor | None, tokens: Tensor | None, mask: Tensor, mean: Tensor, rstd: Tensor,
             weight: Tensor | None, pos: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernel; arguments and results as the op ``fastmim::mask_tokens_backward``."""
    grad, mask = grad.contiguous(), mask.contiguous()
    more, tokens = (None if t is None else t.contiguous() for t in (more, tokens))
    batch, height, width, c = grad.shape
    cfg = config(c, height * width, batch)
    weight = None if weight is None else weight.contiguous()
    kinds = 3 if weight is not None else 1
    d_tokens = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    partial = torch.empty((cfg["blocks"] * cfg["splits"], kinds, c), dtype=torch.float32, device=grad.device)
    d_pos = torch.empty((cfg["splits"], height, width, c) if pos else (1, 0), dtype=torch.float32, device=grad.device)
    sums = torch.empty((kinds, c), dtype=torch.float32, device=grad.device)
    mask_tokens_backward.run(
        grad, more, tokens, mask.view(torch.uint8), mean, rstd, weight, d_tokens, partial,
        arrival.counters(1 + len(partial), grad.device), sums, d_pos if pos else None, batch, height * width,
        cfg["per_program"],
        C=c, BLOCK_P=cfg["BLOCK_P"], BLOCK_C=cfg["BLOCK_C"], GROUP=GROUP, num_warps=cfg["num_warps"],
        maxnreg=REGISTERS if weight is not None else None, grid=(cfg["blocks"], cfg["splits"]), warmup=False)
    return d_tokens, sums, d_pos.sum(0) if d_pos.shape[0] > 1 else d_pos.squeeze(0)


def aot_cases() -> list[AotCase]:
    """Patch embeddings of the shipped encoders: Swin with norm, ViT with positions, bf16 tokens."""
    cases = []
    for name, c, positions, norm in (("swin_b", 128, 2304, True), ("swin_l", 192, 2304, True),
                                     ("swinv2_h", 352, 2304, True), ("swinv2_g", 512, 2304, True),
                                     ("vit_b", 768, 196, False)):
        cfg = config(c, positions, 128)
        tiles = {"C": c, "BLOCK_P": cfg["BLOCK_P"], "BLOCK_C": cfg["BLOCK_C"]}
        absent: dict[str, Any] = {"p_pos": None} if norm else {"p_weight": None, "p_bias": None}
        types = {"p_x": "*bf16", "p_mask": "*u8", "p_token": "*fp32", "p_weight": "*fp32", "p_bias": "*fp32",
                 "p_pos": "*fp32", "p_out": "*bf16", "p_mean": "*fp32", "p_rstd": "*fp32", "batch": "i32",
                 "positions": "i32", "per_program": "i32", "eps": "fp32"}
        cases.append(_case(f"forward/{name}", mask_tokens_forward, types, tiles | absent, cfg["num_warps"]))
        absent = {"p_dpos": None} if norm else {"p_weight": None, "p_x": None, "p_more": None}
        absent["GROUP"] = GROUP
        types = {"p_g": "*bf16", "p_more": "*bf16", "p_counter": "*i32", "p_sums": "*fp32", "p_x": "*bf16",
                 "p_mask": "*u8", "p_mean": "*fp32", "p_rstd": "*fp32", "p_weight": "*fp32", "p_dx": "*bf16",
                 "p_partial": "*fp32", "p_dpos": "*fp32", "batch": "i32", "positions": "i32", "per_program": "i32"}
        cases.append(_case(f"backward/{name}", mask_tokens_backward, types, tiles | absent, cfg["num_warps"],
                           REGISTERS if norm else None))
    return cases


def _trips(a: Mapping[str, Any]) -> tuple[float, ...]:
    """Images that a program walks over."""
    return (a["batch"] / a["grid"][1],)


def _case(name: str, kernel: object, types: dict[str, str], constexprs: dict[str, object], num_warps: int,
          maxnreg: int | None = None) -> AotCase:
    signature = {k: v for k, v in types.items() if k not in constexprs}
    divisible = tuple(k for k, v in signature.items() if v[0] == "*" or k in ("batch", "positions"))
    return AotCase(name, kernel, signature, constexprs, num_warps, 2, divisible, quick=name.endswith(("h", "vit_b")),
                   maxnreg=maxnreg, trips=_trips)
