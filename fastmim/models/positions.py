"""Where a ViT's patches are: relative biases, learned positions at other sizes, and fixed sines and cosines."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import relative_position_index

SINCOS = ("sincos", "sincos_moco")
"""Fixed positions, as MAE and as MoCo v3 order them."""

_LONGEST = 10000.0


def check_positions(kind: bool | str, embed_dim: int) -> None:
    """A known kind of absolute positions; sines and cosines of two axes take a quarter of the channels each.

    Raises:
        ValueError: Names the kinds, or the nearest numbers of channels.
    """
    if not isinstance(kind, bool) and kind not in SINCOS:
        raise ValueError(f"abs_pos_embed={kind!r}: must be false, true (learned), 'sincos' or 'sincos_moco'")
    if kind in SINCOS and embed_dim % 4:
        nearest = dict.fromkeys((max(embed_dim // 4, 1) * 4, -(-embed_dim // 4) * 4))
        raise ValueError(
            f"embed_dim={embed_dim}: not a multiple of 4, as sin-cos positions need; "
            f"use {' or '.join(map(str, nearest))}"
        )


def sincos_positions(grid: tuple[int, int], embed_dim: int, kind: str = "sincos") -> Tensor:
    """(1, 1 + L, D) float32: zero for the class token, then one row a patch, row by row of the image.

    A coordinate t has sin(t·ω) and cos(t·ω) at the D/4 frequencies ω_i = 10000^(−4i/D) (Vaswani et al. 2017, section
    3.5). "sincos" is [sin x, cos x, sin y, cos y] (He et al. 2022), "sincos_moco" [sin y, cos y, sin x, cos x] (Chen
    et al. 2021).
    """
    omega = _LONGEST ** -(torch.arange(embed_dim // 4, dtype=torch.float64, device="cpu") / (embed_dim // 4))
    rows, columns = (torch.arange(edge, dtype=torch.float64, device="cpu") for edge in grid)
    y = rows.repeat_interleave(grid[1])[:, None] * omega
    x = columns.repeat(grid[0])[:, None] * omega
    axes = (y, x) if kind == "sincos_moco" else (x, y)
    patches = torch.cat([wave for axis in axes for wave in (axis.sin(), axis.cos())], 1)
    return F.pad(patches, (0, 0, 1, 0))[None].float()


def absolute_positions(kind: bool | str, grid: tuple[int, int], embed_dim: int) -> nn.Parameter | None:
    """The (1, 1 + L, D) parameter ``pos_embed`` of a kind: none, learned and not yet filled, or fixed."""
    if not kind:
        return None
    learned = not isinstance(kind, str)
    positions = nn.Parameter(torch.empty(1, grid[0] * grid[1] + 1, embed_dim), requires_grad=learned)
    if not learned:
        positions.data.copy_(sincos_positions(grid, embed_dim, str(kind)))
    return positions


def resize_positions(positions: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """(1, 1 + L, D) positions of the class token and of a grid of patches, for another grid, as DINO and iBOT do.

    Bicubic, without antialiasing, at the scale (n + 0.1)/N of each edge, which is not quite a resize to n: published
    weights were trained so.
    """
    if grid == to:
        return positions
    inner = positions[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2).float()
    scale = [(new + 0.1) / old for new, old in zip(to, grid, strict=True)]
    resized = F.interpolate(inner, scale_factor=scale, mode="bicubic", align_corners=False)
    resized = resized.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)
    return torch.cat((positions[:, :1], resized), 1)


def cls_position_index(grid: tuple[int, int]) -> Tensor:
    """(L + 1, L + 1) int64 rows of BEiT's bias table: patch offsets, then cls→patch, patch→cls, cls→cls."""
    inner = relative_position_index(grid)
    distances = (2 * grid[0] - 1) * (2 * grid[1] - 1)
    index = inner.new_empty(inner.shape[0] + 1, inner.shape[0] + 1)
    index[1:, 1:] = inner
    index[0, :] = distances
    index[:, 0] = distances + 1
    index[0, 0] = distances + 2
    return index


def bias_table(grid: tuple[int, int], num_heads: int) -> nn.Parameter:
    """(offsets + 3, num_heads) zeros: one row a patch offset, three for the class token (BEiT, section 2.4)."""
    return nn.Parameter(torch.zeros((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3, num_heads))


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """(num_heads, L + 1, L + 1) biases of a table of :func:`bias_table`."""
    return table.T.index_select(1, index.reshape(-1)).unflatten(1, index.shape)


class RelativePositionBias(nn.Module):
    """Learned bias of every patch offset and of the class token, one for all blocks."""

    def __init__(self, grid: tuple[int, int], num_heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = bias_table(grid, num_heads)

    def forward(self, index: Tensor) -> Tensor:
        """(num_heads, L + 1, L + 1)."""
        return look_up(self.relative_position_bias_table, index)
