"""Shifted-window attention, forward, in one kernel that reads and writes the image layout.

A program keeps one head and walks over a group of windows, so that the head's bias stays in registers (windows
up to 8×8) or in L1. Each window's q, k and v are read once (beyond 192 tokens, k and v once for 64 queries):
all tiles of queries attend to one chunk of keys after the other, under an online softmax. Windows of 65 to 144 tokens
keep whole rows of logits in registers instead (``triton_rows_forward``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot_case import AotCase
from ..common.device import processors
from ..common.sizes import cdiv
from .layout import Pair, pair
from .triton_backward import backward, backward_kernel, backward_large_kernel, reduce_kernel, registers, single_tile
from .triton_backward import config as backward_config
from .triton_fragments import (
    BLOCKS_PER_SM,
    CHUNK,
    KEY_PROGRAMS,
    ROWS,
    WARPS,
    by_rows,
    parts,
)
from .triton_rows_backward import rows_backward_kernel
from .triton_rows_forward import rows_forward_kernel
from .triton_rows_launch import backward_by_rows, tables_kernel
from .triton_tiles import (
    LOG2E,
    Tiling,
    bias_chunks,
    bias_tile,
    biased,
    chunk_offsets,
    common_constexprs,
    full_chunks,
    full_tiles,
    head_scale,
    image_start,
    inverse_norm,
    load_tile,
    next_power,
    store_tile,
    tile_constexprs,
    token_rows,
    token_sides,
    window_groups,
    window_seams,
)

__all__ = ["aot_cases", "backward", "forward"]


@triton.jit
def _queries(p_q, i_window, o_i, image, stride, scale, WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr,
             DP: tl.constexpr, COSINE: tl.constexpr, FULL: tl.constexpr):
    """(q, factor of its logits, sides, image rows) and an empty softmax state of one tile of rows."""
    o_row = token_rows(i_window, o_i, image, WH, WW)
    side = token_sides(o_i, image, WH, WW)
    q = load_tile(p_q, o_row, stride, o_i, WH * WW, D, DP, FULL)
    factor = tl.zeros_like(o_i).to(tl.float32) + scale * LOG2E
    if COSINE:
        factor *= inverse_norm(q)
    # Finite, so that padded rows, all of whose logits are −inf, stay free of NaN until their masked store.
    maximum = tl.full(o_i.shape, -1e30, tl.float32)
    return (q, factor, side, o_row), (maximum, tl.zeros_like(maximum), tl.zeros(q.shape, tl.float32))


@triton.jit
def _attend(queries, state, k, v, key_scale, side_j, seams, bias, COSINE: tl.constexpr, SHIFTED: tl.constexpr,
            PRECISION: tl.constexpr):
    """One step of the online softmax: state is (maximum, sum, weighted values)."""
    q, factor, side_i, _ = queries
    maximum, total, acc = state
    # The norms scale the product, so that q and k enter it unrounded.
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor[:, None]
    if COSINE:
        s *= key_scale[None, :]
    s = biased(s, bias, side_i, side_j, seams, SHIFTED)
    new = tl.maximum(maximum, tl.max(s, 1))
    p = tl.exp2(s - new[:, None])
    decay = tl.exp2(maximum - new)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return new, total * decay + tl.sum(p, 1), acc


@triton.jit
def _step(p_q, p_bias, held, i_window, o_j, rows, queries, state, image, stride, WH: tl.constexpr, WW: tl.constexpr,
          D: tl.constexpr, DP: tl.constexpr, COSINE: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
          FULL_I: tl.constexpr, FULL_J: tl.constexpr):
    """Reads one chunk of keys and lets every tile of queries attend to it; ``held`` is their bias, or empty."""
    o_row = token_rows(i_window, o_j, image, WH, WW)
    side = token_sides(o_j, image, WH, WW)
    seams = window_seams(i_window, image, WH, WW)
    k = load_tile(p_q + stride, o_row, 3 * stride, o_j, WH * WW, D, DP, FULL_J)
    v = load_tile(p_q + 2 * stride, o_row, 3 * stride, o_j, WH * WW, D, DP, FULL_J)
    key_scale = inverse_norm(k) if COSINE else side
    new = ()
    for t in tl.static_range(len(rows)):
        bias = held[t] if len(held) > 0 else bias_tile(p_bias, rows[t], o_j, WH * WW, FULL_I[t], FULL_J)
        new = new + (_attend(queries[t], state[t], k, v, key_scale, side, seams, bias, COSINE, SHIFTED, PRECISION),)
    return new


@triton.jit
def _finish(p_out, p_lse, queries, state, o_i, stride, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
            FULL: tl.constexpr):
    maximum, total, acc = state
    total = tl.maximum(total, 1.0)  # it is at least 1 but in padded rows
    store_tile(p_out, acc / total[:, None], queries[3], stride, o_i, N, D, DP, FULL)
    tl.store(p_lse + o_i, maximum + tl.log2(total), mask=o_i < N)


@triton.jit(do_not_specialize=["windows", "groups", "height", "width", "heads", "shift_y", "shift_x"])
def forward_kernel(
    p_qkv,  # (B, H, W, 3, heads, D)
    p_bias,  # (heads, N, N)
    p_scale,  # (heads,) or None
    p_out,  # (B, H, W, heads, D)
    p_lse,  # (B·windows, heads, N) float32, base 2: backward needs it so
    windows, groups, height, width, heads, shift_y, shift_x,
    WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, KEYS: tl.constexpr, LAST: tl.constexpr,
    HOLD: tl.constexpr, STAGES: tl.constexpr, INNER: tl.constexpr,
):
    N: tl.constexpr = WH * WW
    COSINE: tl.constexpr = p_scale is not None
    i_head = tl.program_id(0) % heads
    i_group = tl.program_id(0) // heads
    image = (height, width, shift_y, shift_x)
    stride = heads * D
    scale = head_scale(p_scale, i_head, D)
    p_bias += i_head.to(tl.int64) * (N * N)
    rows = ()
    for t in tl.static_range(TILES):
        rows = rows + ((tl.program_id(1) * TILES + t) * ROWS + tl.arange(0, ROWS),)
    FULL: tl.constexpr = full_tiles(N, ROWS, TILES)
    held = ()
    if HOLD:
        o_keys = chunk_offsets(N, KEYS, LAST)
        held = bias_chunks(p_bias, rows[0], o_keys, N, FULL[0], full_chunks(N, KEYS, LAST))
    for i_window in tl.range(i_group, windows, groups, num_stages=STAGES, disable_licm=True):
        first = image_start(i_window, image, WH, WW)
        p_q = p_qkv + first * (3 * stride) + i_head * D
        p_o = p_out + first * stride + i_head * D
        p_l = p_lse + (i_window * heads + i_head).to(tl.int64) * N
        queries = ()
        state = ()
        for t in tl.static_range(len(rows)):
            query, empty = _queries(p_q, i_window, rows[t], image, 3 * stride, scale, WH, WW, D, DP, COSINE, FULL[t])
            queries = queries + (query,)
            state = state + (empty,)
        if HOLD:
            for c in tl.static_range(N // KEYS):
                state = _step(p_q, p_bias, (held[c],), i_window, c * KEYS + tl.arange(0, KEYS), rows, queries, state,
                              image, stride, WH, WW, D, DP, COSINE, SHIFTED, PRECISION, FULL, True)
        else:
            for j in tl.range(0, N // KEYS * KEYS, KEYS, num_stages=INNER, disable_licm=True):
                state = _step(p_q, p_bias, (), i_window, j + tl.arange(0, KEYS), rows, queries, state,
                              image, stride, WH, WW, D, DP, COSINE, SHIFTED, PRECISION, FULL, True)
        if LAST > 0:
            state = _step(p_q, p_bias, held[N // KEYS:], i_window, N // KEYS * KEYS + tl.arange(0, LAST), rows,
                          queries, state, image, stride, WH, WW, D, DP, COSINE, SHIFTED, PRECISION, FULL,
                          N % KEYS == LAST)
        for t in tl.static_range(len(rows)):
            _finish(p_o, p_l, queries[t], state[t], rows[t], stride, N, D, DP, FULL[t])


@lru_cache(maxsize=256)
def config(n: int, head_dim: int, dtype: torch.dtype) -> Tiling:
    """Tile sizes of the forward kernel for windows of ``n`` tokens.

    36 tokens are one tile of 64 rows: at 18 FLOP a byte the padded products still hide behind the memory, and
    three blocks of four warps an SM stay in flight; four packed windows would multiply the products by four.
    192 tokens are 3 tiles of 64 rows and 12 chunks of 16 keys: no key is padded.
    """
    wide = dtype == torch.float32 or head_dim > 32
    if n <= 64:
        rows = next_power(n)
        return Tiling(rows, 1, min(rows, 32) if wide else rows, True, max(rows // 16, 1), 1, 1, blocks_per_sm=3)
    if n <= 192 and not wide:
        return Tiling(64, -(-n // 64), 16, False, 4, 1, 1, blocks_per_sm=2)
    # In float32 64 rows of queries are more than the registers hold.
    return Tiling(32 if dtype == torch.float32 else 64, 1, 16 if wide else 32, False, 4, 1, 1, blocks_per_sm=3)


def forward(qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, num_heads: int,
            window_size: Sequence[int], shift_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel; arguments and results as the op ``fastmim::window_attention``.

    Args:
        qkv: (B, H, W, 3C); bfloat16, float16 or float32.
        bias: (heads, N, N), float32 or narrower.
        logit_scale: num_heads values, or None for softmax(q·k/√d).
        num_heads: Number of heads; divides C.
        window_size: (rows, columns), dividing (H, W).
        shift_size: (rows, columns) of the cyclic shift.

    Returns:
        The (B, H, W, C) output in the dtype of ``qkv``, and log2 Σ exp of the logits, (B·windows, heads, N)
        float32, for :func:`backward`.

    Raises:
        ValueError: An image has more than 2^31 values, beyond the kernels' offsets within an image.
    """
    qkv, window_size, shift_size = qkv.contiguous(), pair(window_size), pair(shift_size)
    batch, height, width, c3 = qkv.shape
    if height * width * c3 >= 2**31:
        raise ValueError(f"window_attention: an image of qkv must have fewer than 2^31 values, got {tuple(qkv.shape)}")
    n, head_dim = window_size[0] * window_size[1], c3 // 3 // num_heads
    windows = batch * height * width // n
    out = torch.empty(batch, height, width, c3 // 3, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(windows, num_heads, n, dtype=torch.float32, device=qkv.device)
    bias, logit_scale = bias.contiguous(), None if logit_scale is None else logit_scale.contiguous()
    common = common_constexprs(head_dim, window_size, any(shift_size), qkv.dtype)
    sizes = (height, width, num_heads, *shift_size)
    if by_rows(n, head_dim, qkv.dtype):
        groups = window_groups(windows, num_heads, processors(qkv.device) * BLOCKS_PER_SM)
        rows_forward_kernel.run(qkv, bias, logit_scale, out, lse, windows, groups, *sizes, **common,
                                PARTS=parts(n), num_warps=WARPS.value, grid=(num_heads * groups,), warmup=False)
        return out, lse
    tiling = config(n, head_dim, qkv.dtype)
    tiles = cdiv(n, tiling.ROWS * tiling.TILES)
    groups = window_groups(windows, num_heads * tiles, processors(qkv.device) * tiling.blocks_per_sm)
    forward_kernel.run(
        qkv, bias, logit_scale, out, lse, windows, groups, *sizes, **common, **tile_constexprs(n, tiling),
        num_warps=tiling.num_warps, grid=(num_heads * groups, tiles), warmup=False)
    return out, lse


_SHAPES = {  # name: (window, heads, head_dim, cosine) of a shifted block, at 192 px where the window allows
    "swin_b_w6": (6, 4, 32, False), "swin_b_w6_stage3": (6, 16, 32, False), "swin_w7": (7, 4, 32, False),
    "swinv2_b_w12": (12, 4, 32, True), "swinv2_l_w12": (12, 6, 32, True), "swinv2_h_w12": (12, 11, 32, True),
    "swinv2_g_w12": (12, 16, 32, True), "swinv2_b_w12_unshifted": (12, 16, 32, True),
    "swinv2_b_w6_last_stage": (6, 32, 32, True), "swinv2_w8": (8, 4, 32, True), "swinv2_w16": (16, 4, 32, True),
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
_QUICK = ("swin_b_w6", "swinv2_b_w12")
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
                       registers(head_dim, dtype, arch))
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
    """Every shipped window and head count, and windows 7, 8, 16 and 24, in bfloat16; the usual two in float32."""
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
