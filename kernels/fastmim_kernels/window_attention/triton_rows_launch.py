"""Launches of the backward by whole rows: the bias as its kernel reads it, then the kernel itself."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import arrival
from ..common.device import processors
from .triton_fragments import BLOCKS_PER_SM, KEY_PROGRAMS, WARPS, by_rows, parts
from .triton_rows_backward import rows_backward_kernel
from .triton_tiles import LN2, MASKED_LOGIT, common_constexprs, token_sides, window_groups


def backward_by_rows(n: int, head_dim: int, dtype: torch.dtype, arch: int) -> bool:
    """Whether windows of ``n`` tokens take ``rows_backward_kernel``: on sm_80 and sm_100 it would spill."""
    return arch == 90 and by_rows(n, head_dim, dtype)


@triton.jit(do_not_specialize=["shift_y", "shift_x"])
def tables_kernel(
    p_bias,  # (heads, N, N)
    p_table,  # (heads, VARIANTS, N, N) float32, out: the bias with the mask of each kind of window; None: not wanted
    p_turned,  # (heads, VARIANTS, N, N) float32, out: the same, queries and keys exchanged
    shift_y, shift_x,
    WH: tl.constexpr, WW: tl.constexpr, VARIANTS: tl.constexpr, BLOCK: tl.constexpr,
):
    N: tl.constexpr = WH * WW
    TILES: tl.constexpr = (N + BLOCK - 1) // BLOCK
    i_map = tl.program_id(0) // (TILES * TILES)
    i_tile = tl.program_id(0) % (TILES * TILES)
    o_i = i_tile // TILES * BLOCK + tl.arange(0, BLOCK)
    o_j = i_tile % TILES * BLOCK + tl.arange(0, BLOCK)
    mask = (o_i < N)[:, None] & (o_j < N)[None, :]
    o_tile = o_i[:, None] * N + o_j[None, :]
    bias = tl.load(p_bias + (i_map // VARIANTS).to(tl.int64) * (N * N) + o_tile, mask=mask, other=0.0).to(tl.float32)
    if VARIANTS > 1:
        seams = i_map % VARIANTS
        image = (0, 0, shift_y, shift_x)
        side_i = token_sides(o_i, image, WH, WW) & seams
        side_j = token_sides(o_j, image, WH, WW) & seams
        bias += tl.where(side_i[:, None] != side_j[None, :], MASKED_LOGIT * LN2, 0.0)
    first = i_map.to(tl.int64) * (N * N)
    if p_table is not None:
        tl.store(p_table + first + o_tile, bias, mask=mask)
    o_turned = o_j[:, None] * N + o_i[None, :]
    tl.store(p_turned + first + o_turned, tl.trans(bias), mask=(o_j < N)[:, None] & (o_i < N)[None, :])


def bias_tables(bias: Tensor, window_size: tuple[int, int], shift_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The bias, with a shift one for each kind of window, as ``rows_backward_kernel`` reads it.

    Masks are added here, once, and not where every window would compare the sides of all its pairs.

    Args:
        bias: (heads, N, N), contiguous.
        window_size, shift_size: As given to ``forward``.

    Returns:
        (heads, 1 or 4, N, N), and the same with queries and keys exchanged, float32. The first is ``bias`` itself
        without a shift. Entry s of the four belongs to the windows whose ``window_seams`` are s.
    """
    heads, n, _ = bias.shape
    shifted = any(shift_size)
    variants = 4 if shifted else 1
    turned = torch.empty(heads, variants, n, n, dtype=torch.float32, device=bias.device)
    table = torch.empty_like(turned) if shifted else None
    tables_kernel.run(
        bias, table, turned, *shift_size, WH=window_size[0], WW=window_size[1], VARIANTS=variants, BLOCK=32,
        num_warps=4, grid=(heads * variants * triton.cdiv(n, 32) ** 2,), warmup=False)
    return bias if table is None else table, turned


def rows_backward(grad_out: Tensor, qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, out: Tensor, lse: Tensor,
                  num_heads: int, window_size: tuple[int, int], shift_size: tuple[int, int], bias_grad: bool
                  ) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As ``triton_backward.backward``, of contiguous tensors; the last is None without a logit scale."""
    _, height, width, c3 = qkv.shape
    n, head_dim = window_size[0] * window_size[1], c3 // 3 // num_heads
    windows, tiles = lse.shape[0], parts(n)
    programs = num_heads * (tiles + KEY_PROGRAMS.value)
    groups = window_groups(windows, programs, processors(qkv.device) * BLOCKS_PER_SM)
    tables = bias_tables(bias, window_size, shift_size)
    new: dict[str, Any] = {"dtype": torch.float32, "device": qkv.device}
    dqkv, dbias, partial, total, shares, count = torch.empty_like(qkv), None, None, None, None, None
    if bias_grad:
        dbias = torch.empty(num_heads, n, n, **new)
        partial = torch.empty(num_heads, groups, n, n, **new)
    if logit_scale is not None:
        total = torch.empty(logit_scale.shape, **new)
        shares = torch.empty(num_heads, groups, tiles, **new)
    if bias_grad or logit_scale is not None:
        count = arrival.counters(num_heads * (tiles + 1), qkv.device)
    rows = torch.empty(num_heads, groups, KEY_PROGRAMS.value, 2, n, **new)
    rows_backward_kernel.run(
        grad_out, qkv, *tables, logit_scale, out, lse, dqkv, partial, dbias, shares, total, count, rows,
        windows, groups, height, width, num_heads, *shift_size,
        **common_constexprs(head_dim, window_size, any(shift_size), qkv.dtype), PARTS=tiles, num_warps=WARPS.value,
        grid=(programs * groups,), warmup=False)
    return dqkv, dbias, total
