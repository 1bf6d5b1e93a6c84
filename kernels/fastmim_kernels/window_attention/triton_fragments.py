"""Tiles in the order in which a tensor core's accumulator holds them, for windows of 65 to 144 tokens.

A thread of an accumulator owns rows g and g + 8 and the columns 2l, 2l + 1, 2l + 8, 2l + 9 of a 16×16 piece: eight
bytes of a row of the bias. Attention does not ask in which order its queries and keys come. With row m of the tile
standing for query :func:`row_order`\\ (m) and column c for key :func:`key_order`\\ (c), a thread owns four keys in a
row: the bias is read, and its gradient written, by 128-bit accesses straight into the accumulator's registers, where
a tile in natural order passes through shared memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .triton_tiles import NORM_EPS, window_seams

ROWS = tl.constexpr(64)  # queries, or keys in the key-side kernel, of a program
WARPS = tl.constexpr(4)
CHUNK = tl.constexpr(32)  # keys, or queries in the key-side kernel, of a tile
KEY_PROGRAMS = tl.constexpr(2)  # of the key-side kernel a group of windows
BLOCKS_PER_SM = 2
SMALLEST, LARGEST = 64, 144  # tokens of a window, the first exclusive; beyond, a row of logits outgrows the registers


def by_rows(n: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether windows of ``n`` tokens take the kernels of whole rows."""
    return SMALLEST < n <= LARGEST and head_dim <= 32 and dtype != torch.float32


def parts(n: int) -> int:
    """Programs that share the rows of a window."""
    return -(-n // ROWS.value)


@triton.constexpr_function
def chunks(n, width):
    """Widths of the chunks of ``n`` keys: powers of two, ``width`` at most and 16 at least."""
    found, left = [], -(-n // 16) * 16
    while left:
        size = width
        while size > left:
            size //= 2
        found.append(size)
        left -= size
    return found


@triton.constexpr_function
def starts(n, width):
    """First key of each of :func:`chunks`."""
    found, at = [], 0
    for size in chunks(n, width):
        found.append(at)
        at += size
    return found


@triton.constexpr_function
def at(values, i):
    """``values[i]`` as a constexpr: Triton 3.6 takes no plain item of a list for a tensor's side."""
    return values[i]


@triton.jit
def row_order():
    """Which of a program's rows stands in row m of its tile."""
    m = tl.arange(0, ROWS)
    return (m & 8) * WARPS + (m // 16 * 8) + (m & 7)


@triton.jit
def key_order(KEYS: tl.constexpr):
    """Which key of a chunk stands in column c of its tile."""
    c = tl.arange(0, KEYS)
    return c // 16 * 16 + (c & 6) * 2 + (c & 8) // 4 + (c & 1)


@triton.jit
def part_rows(i_part, N: tl.constexpr, PARTS: tl.constexpr):
    """[first, end) of the rows of a part; the rest of its tile is padding."""
    own: tl.constexpr = (N + PARTS - 1) // PARTS
    return i_part * own, tl.minimum((i_part + 1) * own, N)


@triton.jit
def bias_map(p_bias, i_head, i_window, image, WH: tl.constexpr, WW: tl.constexpr, SHIFTED: tl.constexpr):
    """The head's (N, N) map for windows like this one, of :func:`bias_tables`."""
    if SHIFTED:
        return p_bias + (i_head * 4 + window_seams(i_window, image, WH, WW)).to(tl.int64) * (WH * WW * WH * WW)
    else:
        return p_bias + i_head.to(tl.int64) * (WH * WW * WH * WW)


@triton.jit
def _pieces(p_map, i_first, i_end, j: tl.constexpr, N: tl.constexpr, KEYS: tl.constexpr):
    """Pointers (KEYS/16, ROWS, 16) to a tile of an (N, N) map, and which are rows below ``i_end`` and columns."""
    o_i = (i_first + tl.arange(0, ROWS))[None, :, None]
    o_j = (j + 16 * tl.arange(0, KEYS // 16))[:, None, None] + tl.arange(0, 16)[None, None, :]
    # One offset, made with i_first: columns by themselves would fill registers of the caller's loop.
    return p_map + (o_i * N + o_j), o_i < i_end if j + KEYS <= N else (o_i < i_end) & (o_j < N)


@triton.jit
def load_fragment(p_map, i_first, i_end, j: tl.constexpr, N: tl.constexpr, KEYS: tl.constexpr):
    """(ROWS, KEYS) float32 of an (N, N) map in :func:`row_order` and :func:`key_order`; −inf where there is none."""
    p_tile, m_tile = _pieces(p_map, i_first, i_end, j, N, KEYS)
    tile = tl.load(p_tile, mask=m_tile, other=-float("inf")).to(tl.float32)
    tile = tl.reshape(tile, [KEYS // 16, 2, WARPS, 8, 4, 2, 2])
    return tl.reshape(tl.permute(tile, (2, 1, 3, 0, 5, 4, 6)), [ROWS, KEYS])


@triton.jit
def store_fragment(p_map, tile, i_first, i_end, j: tl.constexpr, N: tl.constexpr, KEYS: tl.constexpr):
    """The reverse of :func:`load_fragment`."""
    p_tile, m_tile = _pieces(p_map, i_first, i_end, j, N, KEYS)
    tile = tl.reshape(tile, [WARPS, 2, 8, KEYS // 16, 2, 4, 2])
    tile = tl.reshape(tl.permute(tile, (3, 1, 0, 2, 5, 4, 6)), [KEYS // 16, ROWS, 16])
    tl.store(p_tile, tile, mask=m_tile)


@triton.jit
def thread_sums(tile, KEYS: tl.constexpr):
    """(ROWS, 4): for each of a row's four threads the sum of what it holds; nothing moves between threads."""
    return tl.sum(tl.sum(tl.reshape(tile, [ROWS, KEYS // 8, 4, 2]), 3), 1)


@triton.jit
def load_rows(p_base, o_row, m_row, stride, D: tl.constexpr, DP: tl.constexpr):
    """(rows, DP) of one head, zeros beyond D and where ``m_row``, unless it is None, is false."""
    p_tile = p_base + (o_row * stride)[:, None] + tl.arange(0, DP)[None, :]
    m_d = (tl.arange(0, DP) < D)[None, :]
    if m_row is not None:
        return tl.load(p_tile, mask=m_row[:, None] if D == DP else m_row[:, None] & m_d, other=0.0)
    elif D == DP:
        return tl.load(p_tile)
    else:
        return tl.load(p_tile, mask=m_d, other=0.0)


@triton.jit
def row_inverse(x):
    """1 / max(‖row‖, eps) within two float32 roundings: ``inverse_norm`` divides, for which sm_80 lacks registers."""
    x = x.to(tl.float32)
    return tl.rsqrt(tl.maximum(tl.sum(x * x, 1), NORM_EPS * NORM_EPS))


@triton.jit
def exact_where_clamped(inverse):
    """``row_inverse`` with exactly 1 / eps where it is that but for its rounding: so ``through_norm`` knows a clamp."""
    return tl.where(inverse * NORM_EPS > 1 - 1e-6, 1 / NORM_EPS, inverse)


@triton.jit
def load_values(p_base, o_n, N: tl.constexpr, FULL: tl.constexpr):
    """One value a token, 0 beyond N; FULL promises that all exist."""
    return tl.load(p_base + o_n) if FULL else tl.load(p_base + o_n, mask=o_n < N, other=0.0)


@triton.jit
def store_rows(p_base, tile, o_row, m_row, stride, D: tl.constexpr, DP: tl.constexpr):
    p_tile = p_base + (o_row * stride)[:, None] + tl.arange(0, DP)[None, :]
    mask = m_row[:, None] if D == DP else m_row[:, None] & (tl.arange(0, DP) < D)[None, :]
    tl.store(p_tile, tile.to(p_base.dtype.element_ty), mask=mask)
