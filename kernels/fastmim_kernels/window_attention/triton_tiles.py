"""Pieces that the forward and the backward window-attention kernels share: indices, tiles, logits, sizes.

The cyclic shift and the window partition are index arithmetic here: token n of a window is a row of the
image layout, and two tokens may attend to each other when their shift groups agree.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1 / math.log(2))
LN2 = tl.constexpr(math.log(2))
MAX_LOGIT_SCALE = tl.constexpr(math.log(100.0))
MASKED_LOGIT = tl.constexpr(-100.0 / math.log(2))
NORM_EPS = tl.constexpr(1e-12)


@triton.constexpr_function
def chunk(c, n, keys, last):
    """Width of chunk ``c`` of the keys: all are ``keys`` wide, a remainder gets a chunk of width ``last``."""
    return keys if c < n // keys else last


@triton.constexpr_function
def full_chunks(n, keys, last):
    """Whether each chunk of keys holds no padding."""
    return [True] * (n // keys) + [n % keys == last] * (last > 0)


@triton.constexpr_function
def full_tiles(n, rows, tiles):
    """Whether each of a program's tiles of rows holds no padding; a program may start at any tile."""
    return [n % rows == 0 or (t + 1) * rows <= n <= tiles * rows for t in range(tiles)]


@triton.jit
def token_rows(i_window, o_n, image, WH: tl.constexpr, WW: tl.constexpr):
    """Rows of the image's (H·W) map that hold tokens ``o_n`` of a window; ``image`` as in the kernels."""
    height, width, shift_y, shift_x = image
    n_x = width // WW
    i_w = i_window % ((height // WH) * n_x)
    o_y = (i_w // n_x) * WH + o_n // WW + shift_y
    o_x = (i_w % n_x) * WW + o_n % WW + shift_x
    o_y = tl.where(o_y >= height, o_y - height, o_y)
    o_x = tl.where(o_x >= width, o_x - width, o_x)
    return o_y * width + o_x


@triton.jit
def token_sides(o_n, image, WH: tl.constexpr, WW: tl.constexpr):
    """Bits of a token: 2 below the last row of windows' seam, 1 right of the last column's; same in all windows."""
    _, _, shift_y, shift_x = image
    return (o_n // WW >= WH - shift_y).to(tl.int32) * 2 + (o_n % WW >= WW - shift_x).to(tl.int32)


@triton.jit
def window_seams(i_window, image, WH: tl.constexpr, WW: tl.constexpr):
    """Which bits of :func:`token_sides` keep tokens of this window apart: those of a seam that crosses it."""
    height, width, _, _ = image
    n_x = width // WW
    n_y = height // WH
    i_w = i_window % (n_y * n_x)
    return (i_w // n_x == n_y - 1).to(tl.int32) * 2 + (i_w % n_x == n_x - 1).to(tl.int32)


@triton.jit
def image_start(i_window, image, WH: tl.constexpr, WW: tl.constexpr):
    """First row, in (B·H·W), of a window's image; int64 because the map can exceed 2^31 elements."""
    height, width, _, _ = image
    return (i_window // ((height // WH) * (width // WW))).to(tl.int64) * (height * width)


@triton.jit
def tile_mask(o_n, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    return (o_n < N)[:, None] & (tl.arange(0, DP) < D)[None, :]


@triton.jit
def load_tile(p_base, o_row, stride, o_n, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
              FULL: tl.constexpr):
    """(rows, DP) of one head, zeros beyond N and D; FULL promises that all rows exist."""
    p_tile = p_base + (o_row * stride)[:, None] + tl.arange(0, DP)[None, :]
    if FULL and D == DP:
        return tl.load(p_tile)
    else:
        return tl.load(p_tile, mask=tile_mask(o_n, N, D, DP), other=0.0)


@triton.jit
def store_tile(p_base, tile, o_row, stride, o_n, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
               FULL: tl.constexpr):
    p_tile = p_base + (o_row * stride)[:, None] + tl.arange(0, DP)[None, :]
    tile = tile.to(p_base.dtype.element_ty)
    if FULL and D == DP:
        tl.store(p_tile, tile)
    else:
        tl.store(p_tile, tile, mask=tile_mask(o_n, N, D, DP))


@triton.jit
def bias_tile(p_bias, o_i, o_j, N: tl.constexpr, FULL_I: tl.constexpr, FULL_J: tl.constexpr):
    """Bias of one head's (queries, keys), −inf beyond N."""
    p_tile = p_bias + o_i[:, None] * N + o_j[None, :]
    if FULL_I and FULL_J:
        return tl.load(p_tile).to(tl.float32)
    elif FULL_J:
        return tl.load(p_tile, mask=(o_i < N)[:, None], other=-float("inf")).to(tl.float32)
    else:
        return tl.load(p_tile, mask=(o_i < N)[:, None] & (o_j < N)[None, :], other=-float("inf")).to(tl.float32)


@triton.jit
def chunk_offsets(N: tl.constexpr, KEYS: tl.constexpr, LAST: tl.constexpr):
    """Token numbers of each chunk of keys."""
    offsets = ()
    for c in tl.static_range(N // KEYS + (LAST > 0)):
        offsets = offsets + (c * KEYS + tl.arange(0, chunk(c, N, KEYS, LAST)),)
    return offsets


@triton.jit
def bias_chunks(p_bias, o_i, o_keys, N: tl.constexpr, FULL_I: tl.constexpr, FULL_J: tl.constexpr):
    """The bias of a tile of queries, one tensor a chunk of keys, to be held in registers."""
    held = ()
    for c in tl.static_range(len(o_keys)):
        held = held + (bias_tile(p_bias, o_i, o_keys[c], N, FULL_I, FULL_J[c]),)
    return held


@triton.jit
def inverse_norm(x):
    """1 / max(‖row‖, eps), the factor of ``F.normalize``."""
    x = x.to(tl.float32)
    return 1 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), NORM_EPS)


@triton.jit
def head_scale(p_scale, i_head, D: tl.constexpr):
    """Factor of the logits: exp(min(λ, ln 100)), or 1/√d without a logit scale."""
    if p_scale is None:
        return 1.0 / tl.sqrt(tl.full([], D, tl.float32))
    else:
        return tl.exp(tl.minimum(tl.load(p_scale + i_head).to(tl.float32), MAX_LOGIT_SCALE))


@triton.jit
def biased(s, bias, side_a, side_b, seams, SHIFTED: tl.constexpr):
    """Logits times log2(e) with bias and shift mask; ``side_a`` belongs to the rows, ``side_b`` to the columns."""
    s += bias * LOG2E
    if SHIFTED:
        # In this order the comparison depends on the window: hoisted out of its loop it would fill registers.
        s += tl.where((side_a & seams)[:, None] != (side_b & seams)[None, :], MASKED_LOGIT, 0.0)
    return s


class Tiling(NamedTuple):
    """Static sizes of a kernel.

    Attributes:
        ROWS, TILES: Queries a tile, tiles a program.
        KEYS: Keys a chunk.
        HOLD: One tile holds all queries; bias (forward) or bias gradient (backward) stay in registers.
        num_warps: As for Triton.
        STAGES, INNER: Software pipelining of the loop over windows, and of the one over keys.
        blocks_per_sm: Programs an SM that the registers allow; sets the number of groups of windows.
    """

    ROWS: int
    TILES: int
    KEYS: int
    HOLD: bool
    num_warps: int
    STAGES: int
    INNER: int
    blocks_per_sm: int


@lru_cache(maxsize=256)
def tile_constexprs(n: int, tiling: Tiling) -> dict[str, Any]:
    """Tile-size constexprs of both kernels; LAST is the width of the last, partial chunk of keys, or 0."""
    last = next_power(n % tiling.KEYS) if n % tiling.KEYS else 0
    return dict(ROWS=tiling.ROWS, TILES=tiling.TILES, KEYS=tiling.KEYS, LAST=last, HOLD=tiling.HOLD,
                STAGES=tiling.STAGES, INNER=tiling.INNER)


def next_power(n: int) -> int:
    """Smallest power of two ≥ max(n, 16), the shortest side of a tensor-core tile."""
    return max(16, 1 << (n - 1).bit_length())


@lru_cache(maxsize=256)
def window_groups(windows: int, programs: int, slots: int) -> int:
    """How many groups share the windows so that persistent programs, ``programs`` of them a group, end together.

    Minimises waves × windows of the longest group, plus one window's worth of work for what every program
    does once; partial sums grow with the number of groups, so ties go to the fewest.
    """
    def cost(groups: int) -> int:
        return -(-programs * groups // slots) * (-(-windows // groups) + 1)

    most = min(windows, max(1, 4 * slots // programs))
    return min(range(1, most + 1), key=cost)


@lru_cache(maxsize=256)
def common_constexprs(head_dim: int, window_size: tuple[int, int], shifted: bool,
                      dtype: torch.dtype) -> dict[str, Any]:
    """Constexprs that both kernels take.

    float32 uses three tf32 products ("tf32x3"): as exact as float32 within a few 1e-7, on tensor cores,
    where "ieee" would leave them.
    """
    return dict(WH=window_size[0], WW=window_size[1], D=head_dim, DP=next_power(head_dim), SHIFTED=shifted,
                PRECISION="tf32x3" if dtype == torch.float32 else None)
