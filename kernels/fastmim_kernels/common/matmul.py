"""What the kernels with a matrix product share: the order of the tiles, their edges, what profilers are told."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from .aot_case import AotCase
from .sizes import next_power_of_2

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
def sum_rows(p_sums, o_n, m_n, first, stride, count, N: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr):
    """Σ of ``count`` rows of partial sums, first, first + stride, …: always in the same order."""
    acc = tl.zeros((ROWS, BN), tl.float32)
    for i in range(0, count, ROWS):
        o_i = i + tl.arange(0, ROWS)
        p_rows = p_sums + (first + o_i * stride)[:, None] * N + o_n[None, :]
        acc += tl.load(p_rows, mask=(o_i < count)[:, None] & m_n[None, :], other=0, cache_modifier=".cg")
    return tl.sum(acc, 0)


@triton.jit
def halves(b_tile):
    """The left and the right columns of a tile."""
    return tl.split(tl.permute(tl.reshape(b_tile, (b_tile.shape[0], 2, b_tile.shape[1] // 2)), (0, 2, 1)))


def block(width: int, limit: int) -> int:
    return max(16, min(limit, next_power_of_2(width)))


def precision(dtype: torch.dtype) -> str:
    """How products of ``dtype`` are made: "tf32" where the user allows that for float32, else "ieee".

    ``fp32_precision`` follows both ways to allow it; ``allow_tf32`` raises where it was allowed the new way.
    """
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


@lru_cache(maxsize=256)
def tile_config(columns: int, depth: int, dtype: torch.dtype, sm: int) -> dict[str, int]:
    """Tiles of a product with an epilogue, that leave room for two blocks on a multiprocessor of ``sm_<sm>``."""
    if dtype == torch.float32:
        return {"BM": 64, "BN": block(columns, 64), "BK": 32, "num_warps": 4, "num_stages": 3}
    deep = 64 if sm >= 90 and depth % 64 == 0 else 32
    return {"BM": 128, "BN": block(columns, 128), "BK": deep, "num_warps": 8, "num_stages": 3 if deep == 64 else 4}


@lru_cache(maxsize=256)
def narrow_config(columns: int, depth: int, dtype: torch.dtype, sm: int) -> dict[str, int]:
    """As :func:`tile_config`, for kernels that also read a tile of the result's shape: on sm_80 half as wide."""
    narrow = {} if sm >= 90 or dtype == torch.float32 else {"BN": block(columns, 64)}
    return tile_config(columns, depth, dtype, sm) | narrow


def for_two_blocks(tiles: dict[str, int]) -> dict[str, int]:
    """``tiles`` of 8 warps with at most the 128 registers a thread of which two blocks fit on a multiprocessor.

    Triton 3.6 takes a few more by itself, 3.8 does not; neither spills for it.
    """
    return tiles | ({"maxnreg": 128} if tiles["num_warps"] == 8 else {})


STAGES = {"swin_s": (96, (1, 8)), "swin_b": (128, (1, 4, 8)), "swin_l": (192, (1, 8)), "swinv2_h": (352, (1, 8)),
          "swinv2_g": (512, (1, 8))}
"""Width of the first stage of the shipped encoders, and the multiples of it that are compiled."""


def depth_trips(a: Mapping[str, Any]) -> tuple[float, ...]:
    """``AotCase.trips`` of a loop over the depth K of a product."""
    return (-(-a["K"] // a["BK"]),)


def aot_case(name: str, kernel: Any, tiles: dict[str, int], constexprs: dict[str, Any], sm: int, quick: bool,
             dtype: torch.dtype = torch.bfloat16, trips: Any = depth_trips, alone: bool = False) -> AotCase:
    """A kernel with fp32 parameters on the architecture that its tiles are for; fp32 products are exact by default.

    ``alone``: a block holds its multiprocessor alone.
    """
    constexprs = {"GROUP": GROUP, "PRECISION": "ieee", **constexprs, **{k: v for k, v in tiles.items() if k.isupper()}}
    wide = ("p_bias", "p_dw", "p_dbias", "p_partial", "p_sums")
    low, suffix = ("*fp32", "-in-fp32") if dtype == torch.float32 else ("*bf16", "")
    signature = {n: "*fp32" if n in wide else "*i32" if n == "p_count" else low if n[:2] == "p_" else "i32"
                 for n in kernel.arg_names if n not in constexprs}
    return AotCase(f"{name}-sm{sm}{suffix}", kernel, signature, constexprs, tiles["num_warps"], tiles["num_stages"],
                   tuple(signature), quick, dot=dtype != torch.float32, archs=(sm,), others=("fp16",),
                   maxnreg=tiles.get("maxnreg"), persistent=alone, trips=trips)


def aot_dtypes(quick: bool, sm: int) -> tuple[torch.dtype, ...]:
    """In which precisions a configuration is compiled; float16 has the tiles of bfloat16."""
    return (torch.bfloat16, torch.float32) if quick and sm < 100 else (torch.bfloat16,)
