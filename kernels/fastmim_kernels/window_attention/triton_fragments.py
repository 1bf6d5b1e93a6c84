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
from torch import Tensor

from .triton_tiles import token_sides, window_seams

ROWS = tl.constexpr(64)  # queries, or keys in the key-side kernel, of a program
WARPS = tl.constexpr(4)
CHUNK = tl.constexpr(32)  # keys, or queries in the key-side kernel, of a tile
BLOCKS_PER_SM = 2
SMALLEST, LARGEST = 64, 144  # tokens of a window, the first exclusive; beyond, a row of logits outgrows the registers
MASK = tl.constexpr(-100.0)


def fits(n: int, head_dim: int, dtype: torch.dtype) -> bool:
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
    return p_map + o_i * N + o_j, o_i < i_end if j + KEYS <= N else (o_i < i_end) & (o_j < N)


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
def load_values(p_base, o_n, N: tl.constexpr, FULL: tl.constexpr):
    """One value a token, 0 beyond N; FULL promises that all exist."""
    return tl.load(p_base + o_n) if FULL else tl.load(p_base + o_n, mask=o_n < N, other=0.0)


@triton.jit
def store_rows(p_base, tile, o_row, m_row, stride, D: tl.constexpr, DP: tl.constexpr):
    p_tile = p_base + (o_row * stride)[:, None] + tl.arange(0, DP)[None, :]
    mask = m_row[:, None] if D == DP else m_row[:, None] & (tl.arange(0, DP) < D)[None, :]
    tl.store(p_tile, tile.to(p_base.dtype.element_ty), mask=mask)


@triton.jit
def tables_kernel(
    p_bias,  # (heads, N, N)
    p_table,  # (heads, VARIANTS, N, N) float32: bias with the shift mask of each kind of window; None: not wanted
    p_turned,  # the same, queries and keys exchanged; None: not wanted
    shift_y, shift_x,
    WH: tl.constexpr, WW: tl.constexpr, VARIANTS: tl.constexpr, BLOCK: tl.constexpr,
):
    N: tl.constexpr = WH * WW
    i_map = tl.program_id(0)
    o_i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    o_j = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    mask = (o_i < N)[:, None] & (o_j < N)[None, :]
    o_tile = o_i[:, None] * N + o_j[None, :]
    bias = tl.load(p_bias + (i_map // VARIANTS).to(tl.int64) * (N * N) + o_tile, mask=mask, other=0.0).to(tl.float32)
    if VARIANTS > 1:
        seams = i_map % VARIANTS
        image = (0, 0, shift_y, shift_x)
        side_i = token_sides(o_i, image, WH, WW) & seams
        side_j = token_sides(o_j, image, WH, WW) & seams
        bias += tl.where(side_i[:, None] != side_j[None, :], MASK, 0.0)
    first = i_map.to(tl.int64) * (N * N)
    if p_table is not None:
        tl.store(p_table + first + o_tile, bias, mask=mask)
    if p_turned is not None:
        o_turned = o_j[:, None] * N + o_i[None, :]
        tl.store(p_turned + first + o_turned, tl.trans(bias), mask=(o_j < N)[:, None] & (o_i < N)[None, :])


def bias_tables(bias: Tensor, window_size: tuple[int, int], shift_size: tuple[int, int], turned: bool
                ) -> tuple[Tensor, Tensor | None]:
    """The bias, with a shift one for each kind of window, as the kernels of whole rows read it.

    Masks are added here, once, and not where every window would compare the sides of all its pairs.

    Args:
        bias: (heads, N, N).
        window_size, shift_size: As given to ``forward``.
        turned: Whether the table with queries and keys exchanged is wanted too.

    Returns:
        (heads, 1 or 4, N, N) float32, its first (``bias`` itself without a shift) and its exchanged form or None.
        Entry s of the four belongs to the windows whose ``window_seams`` are s.
    """
    heads, n, _ = bias.shape
    shifted = any(shift_size)
    if not shifted and not turned:
        return bias.contiguous(), None
    variants = 4 if shifted else 1
    new = {"dtype": torch.float32, "device": bias.device}
    table = torch.empty(heads, variants, n, n, **new) if shifted else None
    other = torch.empty(heads, variants, n, n, **new) if turned else None
    tiles = triton.cdiv(n, 32)
    bias = bias.contiguous()
    tables_kernel[(heads * variants, tiles, tiles)](
        bias, table, other, *shift_size, WH=window_size[0], WW=window_size[1], VARIANTS=variants, BLOCK=32,
        num_warps=4)
    return bias if table is None else table, other
