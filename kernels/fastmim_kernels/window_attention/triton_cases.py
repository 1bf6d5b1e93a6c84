"""The kernels of window attention as they are compiled ahead of time: shapes, tiles, and trips of their loops."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..common.aot_case import AotCase
from ..common.sizes import cdiv
from .layout import Pair
from .triton_backward import backward_kernel, backward_large_kernel, reduce_kernel, registers, single_tile
from .triton_backward import config as backward_config
from .triton_forward import config, forward_kernel
from .triton_fragments import BLOCKS_PER_SM, CHUNK, KEY_PROGRAMS, ROWS, WARPS, by_rows, parts
from .triton_rows_backward import rows_backward_kernel
from .triton_rows_forward import rows_forward_kernel
from .triton_rows_launch import backward_by_rows, tables_kernel
from .triton_tiles import Tiling, common_constexprs, tile_constexprs

_SHAPES = {  # name: (window, heads, head_dim, cosine) of a shifted block, at 192 px where the window allows
    "swin_b_w6": (6, 4, 32, False), "swin_b_w6_stage3": (6, 16, 32, False), "swin_b_w6_unshifted": (6, 16, 32, False),
    "swin_w7": (7, 4, 32, False),
    "swinv2_b_w12": (12, 4, 32, True), "swinv2_l_w12": (12, 6, 32, True), "swinv2_h_w12": (12, 11, 32, True),
    "swinv2_g_w12": (12, 16, 32, True), "swinv2_b_w12_unshifted": (12, 16, 32, True),
    "swinv2_b_w6_unshifted": (6, 32, 32, True), "swinv2_w8": (8, 4, 32, True), "swinv2_w16": (16, 4, 32, True),
    "swinv2_w24": (24, 4, 32, True),
}
_VISIBLE = {  # name: (window, heads, head_dim, cosine) of visible_attention, whose maps are single windows
    "visible_swin_b_w6": ((1, 36), 4, 40, False), "visible_swin_w7": ((1, 49), 4, 40, False),
    "visible_swinv2_b_w12": ((1, 144), 4, 40, False),
}
_FORWARD = {"p_qkv": "*bf16", "p_bias": "*fp32", "p_scale": "*fp32", "p_out": "*bf16", "p_lse": "*fp32"}
_BACKWARD = {"p_grad": "*bf16", **_FORWARD, "p_dqkv": "*bf16", "p_partial": "*fp32", "p_dscale": "*fp32"}
_ROWS_BACKWARD = {"p_grad": "*bf16", "p_qkv": "*bf16", "p_bias": "*fp32", "p_turned": "*fp32", "p_scale": "*fp32",
                  "p_out": "*bf16", "p_lse": "*fp32", "p_dqkv": "*bf16", "p_partial": "*fp32", "p_dbias": "*fp32",
                  "p_shares": "*fp32", "p_dscale": "*fp32", "p_count": "*i32", "p_rows": "*fp32"}
_OF_SCALE = ("p_scale", "p_shares", "p_dscale")
_QUICK = ("swin_b_w6", "swin_b_w6_unshifted", "swinv2_b_w12")
_ARCHS = {torch.bfloat16: (80, 90, 100), torch.float32: (80, 90)}
_SIZES = ("windows", "groups", "height", "width", "heads", "shift_y", "shift_x")
_BY_ROWS = Tiling(ROWS.value, 1, CHUNK.value, True, WARPS.value, 1, 1, BLOCKS_PER_SM)


def _forward_case(name: str, window: int | Pair, heads: int, head_dim: int, cosine: bool,
                  dtype: torch.dtype = torch.bfloat16) -> AotCase:
    n = math.prod(_edges(window))
    if by_rows(n, head_dim, dtype):
        return _case("forward", name, window, heads, head_dim, cosine, rows_forward_kernel, _BY_ROWS, _ARCHS[dtype],
                     {"PARTS": parts(n)}, dtype)
    tiling = config(n, head_dim, dtype)
    return _case("forward", name, window, heads, head_dim, cosine, forward_kernel, tiling, _ARCHS[dtype],
                 tile_constexprs(n, tiling), dtype)


def _backward_cases(name: str, window: int | Pair, heads: int, head_dim: int, cosine: bool,
                    dtype: torch.dtype = torch.bfloat16) -> list[AotCase]:
    """One case for the architectures that share a kernel and its tiles."""
    n = math.prod(_edges(window))
    shared: dict[tuple[Any, Tiling, int | None], tuple[int, ...]] = {}
    for arch in _ARCHS[dtype]:
        which = (n, head_dim, dtype, arch, cosine)
        choice: Any = (backward_kernel if single_tile(*which) else backward_large_kernel, backward_config(*which),
                       registers(*which))
        if backward_by_rows(n, head_dim, dtype, arch):
            choice = rows_backward_kernel, _BY_ROWS, None
        shared[choice] = (*shared.get(choice, ()), arch)
    return [_case("backward", name if 90 in archs else f"{name}_sm{archs[0]}", window, heads, head_dim, cosine, kernel,
                  tiling, archs,
                  {"PARTS": parts(n)} if kernel is rows_backward_kernel else {"ROWS": tiling.ROWS, "KEYS": tiling.KEYS},
                  dtype, maxnreg)
            for (kernel, tiling, maxnreg), archs in shared.items()]


def _edges(window: int | Pair) -> Pair:
    return (window, window) if isinstance(window, int) else window


def _case(direction: str, name: str, window: int | Pair, heads: int, head_dim: int, cosine: bool, kernel: Any,
          tiling: Tiling, archs: tuple[int, ...], sizes: dict[str, Any], dtype: torch.dtype,
          maxnreg: int | None = None) -> AotCase:
    edges = _edges(window)
    common = common_constexprs(head_dim, edges, not ("unshifted" in name or name.startswith("visible")), dtype)
    pointers = dict(_ROWS_BACKWARD if kernel is rows_backward_kernel else
                    _BACKWARD if direction == "backward" else _FORWARD)
    wide = dtype == torch.float32
    pointers |= {p: "*fp32" for p in pointers} if wide else {}
    absent = {} if cosine else {p: None for p in _OF_SCALE if p in pointers}
    present = {p: t for p, t in pointers.items() if p not in absent}
    return AotCase(
        f"window_attention/{direction}/{name}{'-in-fp32' * wide}", kernel, present | dict.fromkeys(_SIZES, "i32"),
        common | sizes | absent, num_warps=tiling.num_warps,
        divisible=tuple(present) + (("heads",) if heads % 16 == 0 else ()),
        quick=re.sub("_sm[0-9]+$", "", name) in _QUICK,
        wide_target=0.5 if math.prod(edges) % 2 else 0.95, dot=True, persistent=tiling.blocks_per_sm == 1, archs=archs,
        others=("fp16",), maxnreg=maxnreg, trips=_TRIPS[kernel.fn.__name__])


# Windows of a program; then, where there is one, the loop over keys, and in backward of large windows the tiles of
# queries with their keys and those of keys with their queries. Of whole rows, backward: the windows of the programs of
# keys with their tiles, and those of the programs of queries.
_TRIPS: dict[str, Callable[[Mapping[str, Any]], tuple[float, ...]]] = {
    "rows_forward_kernel": lambda a: (a["windows"] / a["groups"], a["PARTS"]),
    "forward_kernel": lambda a: (a["windows"] / a["groups"], a["WH"] * a["WW"] // a["KEYS"]),
    "backward_kernel": lambda a: (a["windows"] / a["groups"],),
    "backward_large_kernel": lambda a: (
        a["windows"] / a["groups"], *(cdiv(a["WH"] * a["WW"], a[side])
                                      for side in ("ROWS", "KEYS", "KEYS", "ROWS"))),
    "rows_backward_kernel": lambda a: (
        a["windows"] / a["groups"] / (a["PARTS"] + KEY_PROGRAMS.value), a["PARTS"],
        a["windows"] / a["groups"] * a["PARTS"] / (a["PARTS"] + KEY_PROGRAMS.value)),
    "reduce_kernel": lambda a: (cdiv(a["groups"], a["GROUPS"]),),
}


def aot_cases() -> list[AotCase]:
    """Every shipped window and head count, and windows 7, 8, 16 and 24, in bfloat16; the usual ones in float32."""
    shapes: dict[str, tuple[Any, ...]] = {**_SHAPES, **_VISIBLE}
    cases = [_forward_case(name, *shape) for name, shape in shapes.items()]
    cases += [case for name, shape in shapes.items() for case in _backward_cases(name, *shape)]
    for name in _QUICK:
        shape = _SHAPES[name]
        cases += [_forward_case(name, *shape, torch.float32), *_backward_cases(name, *shape, torch.float32)]
    pointers = ("p_partial", "p_dscale", "p_scale", "p_out", "p_dscale_out")
    return [*cases, *map(_tables_case, (True, False)), AotCase(
        "window_attention/reduce/w12", reduce_kernel,
        dict.fromkeys(pointers, "*fp32") | {"groups": "i32", "size": "i32"},
        {"GROUPS": 16, "BLOCK": 256}, divisible=(*pointers, "size"), quick=True, trips=_TRIPS["reduce_kernel"])]


def _tables_case(shifted: bool) -> AotCase:
    pointers = ("p_bias", *(("p_table",) if shifted else ()), "p_turned")
    return AotCase(
        f"window_attention/tables/w12{'' if shifted else '_unshifted'}", tables_kernel,
        dict.fromkeys(pointers, "*fp32") | {"shift_y": "i32", "shift_x": "i32"},
        {"WH": 12, "WW": 12, "VARIANTS": 4 if shifted else 1, "BLOCK": 32} | ({} if shifted else {"p_table": None}),
        divisible=pointers, quick=True, archs=(90,))
