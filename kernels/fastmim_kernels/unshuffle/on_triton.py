"""Kept tokens in their places, the mask token elsewhere, positions added.

A program owns a block of places and walks through the images of the batch: positions and mask token are read once,
their gradients are summed in registers and over the programs in a fixed order.
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


@triton.jit
def _source(p_places, i_b, i_p, m_p, length):
    """(number of a token of image ``i_b``, whether the place has none) of each place ``i_p``, the first the class
    token's."""
    b_place = tl.load(p_places + i_b * (length - 1) + i_p - 1, mask=m_p & (i_p > 0), other=-1)
    return tl.where(i_p > 0, b_place + 1, 0), (i_p > 0) & (b_place < 0)


@triton.jit(do_not_specialize=["batch", "length", "kept", "per_program"])
def unshuffle_forward(
    p_x,  # (B, kept, C) tokens, the class token first
    p_places,  # (B, length - 1) int64, -1 = hidden
    p_token,  # (C,)
    p_pos,  # (length, C)
    p_out,  # (B, length, C)
    batch, length, kept, per_program,
    C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    i_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c = tl.arange(0, BLOCK_C)
    m_p = i_p < length
    m_c = o_c < C
    m_x = m_p[:, None] & m_c
    b_token = tl.load(p_token + o_c, mask=m_c, other=0).to(tl.float32)
    b_pos = tl.load(p_pos + i_p[:, None] * C + o_c, mask=m_x, other=0).to(tl.float32)
    first = tl.program_id(1).to(tl.int64) * per_program
    for i_b in range(first, tl.minimum(first + per_program, batch)):
        i_token, b_hidden = _source(p_places, i_b, i_p, m_p, length)
        p_rows = p_x + (i_b * kept + i_token)[:, None] * C + o_c
        b_x = tl.load(p_rows, mask=(b_hidden == 0)[:, None] & m_x, other=0).to(tl.float32)
        b_y = tl.where(b_hidden[:, None], b_token, b_x) + b_pos
        tl.store(p_out + (i_b * length + i_p)[:, None] * C + o_c, b_y.to(p_out.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["batch", "length", "kept", "per_program"])
def unshuffle_backward(
    p_g,  # (B, length, C) gradient of the result
    p_places,  # (B, length - 1) int64, -1 = hidden
    p_dx,  # (B, kept, C), out
    p_partial,  # (programs, C) float32, scratch
    p_counter,  # int32, see .arrival
    p_dtoken,  # (C,) float32, out
    p_dpos,  # (splits, length, C) float32, out, or None
    batch, length, kept, per_program,
    C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr,
):
    i_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c = tl.arange(0, BLOCK_C)
    m_p = i_p < length
    m_c = o_c < C
    m_x = m_p[:, None] & m_c
    a_token = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    if p_dpos is not None:
        a_pos = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    i_split = tl.program_id(1).to(tl.int64)
    first = i_split * per_program
    for i_b in range(first, tl.minimum(first + per_program, batch)):
        i_token, b_hidden = _source(p_places, i_b, i_p, m_p, length)
        b_g = tl.load(p_g + (i_b * length + i_p)[:, None] * C + o_c, mask=m_x, other=0).to(tl.float32)
        a_token += tl.where(b_hidden[:, None], b_g, 0.0)
        if p_dpos is not None:
            a_pos += b_g
        p_rows = p_dx + (i_b * kept + i_token)[:, None] * C + o_c
        tl.store(p_rows, b_g.to(p_dx.dtype.element_ty), mask=(b_hidden == 0)[:, None] & m_x)
    i_program = i_split * tl.num_programs(0) + tl.program_id(0)
    if p_dpos is not None:
        tl.store(p_dpos + (i_split * length + i_p)[:, None] * C + o_c, a_pos, mask=m_x)
    tl.store(p_partial + i_program * C + o_c, tl.sum(a_token, 0), mask=m_c)
    programs = tl.num_programs(0) * tl.num_programs(1)
    sum_partials(p_partial, p_counter, p_dtoken, i_program, programs, C, GROUP)


def config(channels: int, length: int, batch: int) -> dict[str, int]:
    """Tile and grid: about 2,048 values a tile, 3 blocks on each of 132 SMs, at least 8 images a program."""
    block_c = next_power_of_2(channels)
    block_p = max(1, min(2048 // block_c, next_power_of_2(length)))
    blocks = cdiv(length, block_p)
    per_program = cdiv(batch, max(1, min(cdiv(396, blocks), batch // 8)))
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "per_program": per_program, "blocks": blocks,
            "splits": cdiv(batch, per_program), "num_warps": 4 if block_c * block_p <= 2048 else 8}


def forward(tokens: Tensor, places: Tensor, mask_token: Tensor, pos_embed: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Launch the forward kernel; arguments and result as the op ``fastmim::unshuffle``."""
    batch, kept, c = tokens.shape
    length = 1 + places.shape[1]
    cfg = config(c, length, batch)
    out = torch.empty((batch, length, c), dtype=out_dtype, device=tokens.device)
    unshuffle_forward.run(
        *(t.contiguous() for t in (tokens, places, mask_token, pos_embed)), out, batch, length, kept,
        cfg["per_program"], C=c, BLOCK_P=cfg["BLOCK_P"], BLOCK_C=cfg["BLOCK_C"], num_warps=cfg["num_warps"],
        grid=(cfg["blocks"], cfg["splits"]), warmup=False)
    return out


def backward(grad: Tensor, places: Tensor, kept: int, pos: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernel; arguments and results as the op ``fastmim::unshuffle_backward``."""
    batch, length, c = grad.shape
    cfg, device = config(c, length, batch), grad.device
    d_tokens = torch.empty((batch, kept, c), dtype=dtype, device=device)
    partial = torch.empty((cfg["blocks"] * cfg["splits"], c), dtype=torch.float32, device=device)
    d_token = torch.empty(c, dtype=torch.float32, device=device)
    d_pos = torch.empty((cfg["splits"], length, c) if pos else (1, 0), dtype=torch.float32, device=device)
    unshuffle_backward.run(
        grad.contiguous(), places.contiguous(), d_tokens, partial, arrival.counters(1 + len(partial), device), d_token,
        d_pos if pos else None, batch, length, kept, cfg["per_program"],
        C=c, BLOCK_P=cfg["BLOCK_P"], BLOCK_C=cfg["BLOCK_C"], GROUP=GROUP, num_warps=cfg["num_warps"],
        grid=(cfg["blocks"], cfg["splits"]), warmup=False)
    return d_tokens, d_token, d_pos.sum(0) if d_pos.shape[0] > 1 else d_pos.squeeze(0)


_TYPES = {"p_x": "*bf16", "p_places": "*i64", "p_token": "*fp32", "p_pos": "*fp32", "p_out": "*bf16", "p_g": "*bf16",
          "p_dx": "*bf16", "p_partial": "*fp32", "p_counter": "*i32", "p_dtoken": "*fp32", "p_dpos": "*fp32"}


def aot_cases() -> list[AotCase]:
    """The decoder of MAE's ViT-B, -L and -H at 224 px (patches of 16 and 14), bf16, positions fixed; and learned."""
    cases = []
    for name, c, length, learned in (("mae", 512, 197, False), ("mae_h14", 512, 257, True)):
        cfg = config(c, length, 64)
        tiles = {"C": c, "BLOCK_P": cfg["BLOCK_P"], "BLOCK_C": cfg["BLOCK_C"]}
        back: dict[str, Any] = tiles | {"GROUP": GROUP} | ({} if learned else {"p_dpos": None})
        cases += [_case(f"forward/{name}", unshuffle_forward, tiles, cfg["num_warps"]),
                  _case(f"backward/{name}", unshuffle_backward, back, cfg["num_warps"])]
    return cases


def _trips(a: Mapping[str, Any]) -> tuple[float, ...]:
    """Images that a program walks over."""
    return (a["batch"] / a["grid"][1],)


def _case(name: str, kernel: Any, constexprs: dict[str, Any], num_warps: int) -> AotCase:
    signature = {n: _TYPES.get(n, "i32") for n in kernel.arg_names if n not in constexprs}
    divisible = tuple(k for k, v in signature.items() if v[0] == "*")
    return AotCase(name, kernel, signature, constexprs, num_warps, 2, divisible, quick=True, trips=_trips)
