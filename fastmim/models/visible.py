"""The visible part of an image for a Swin encoder that computes nothing for the rest (Huang et al. 2022, "GreenMIM").

A token of the last map stands on a *column*: its ``stride`` × ``stride`` pixels, which are (stride/p·2⁻ˢ)² tokens of
stage s, an even number of rows and columns of them wherever patches are merged. So merging never looks out of a column,
and a stack of columns, one below the other, is a map that all but attention treats as any other. Masks whose units are
whole columns leave the same number of columns in every image: no shape depends on the mask.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmim_kernels.reference import partition, shift_groups
from fastmim_kernels.window_attention.layout import pad_shifted

Pair = tuple[int, int]


class Windows(NamedTuple):
    """Arguments of :mod:`fastmim_kernels.visible_attention` for one stage, shifted or not."""

    slots: Tensor
    """(B, W, N) int64, as the following."""
    places: Tensor
    groups: Tensor | None
    """(W, N) int64."""
    padded: bool
    """Whether the map has padding."""


class Visible(NamedTuple):
    """The columns that a batch shows, and where their tokens stand in each stage."""

    keep: Tensor
    """(B, U) int64 numbers of columns, row by row."""
    windows: list[Windows]
    """Of every block of the encoder."""

    def into(self, steps: list[Any]) -> list[Any]:
        """The :class:`.Step` of every block, with its windows."""
        return [step._replace(windows=own) for step, own in zip(steps, self.windows, strict=True)]

    def pixels(self, images: Tensor, stride: int) -> Tensor:
        """(B, C, H, W) → (B, C, U·stride, stride): the columns, one below the other."""
        batch, channels, height, width = images.shape
        cut = images.reshape(batch, channels, height // stride, stride, width // stride, stride)
        own = torch.arange(batch, device=images.device)[:, None]
        columns = width // stride
        found = cut.permute(0, 2, 4, 1, 3, 5)[own, self.keep // columns, self.keep % columns]
        return found.transpose(1, 2).reshape(batch, channels, -1, stride)


class VisibleColumns(nn.Module):
    """Finds the places of visible tokens; tables of the encoder's geometry, no parameters.

    Args:
        encoder: A Swin or SwinV2 of images whose edges its ``stride`` divides.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        assert not any(edge % encoder.stride for edge in encoder.img_size), "an image is whole columns"
        self.count = math.prod(edge // encoder.stride for edge in encoder.img_size)
        self.edges: list[int] = []
        self.padded: list[bool] = []
        self.kinds: list[tuple[str, int]] = []
        for stage, layer in enumerate(encoder.layers):
            scale = encoder.patch_size * 2**stage
            self.edges.append(encoder.stride // scale)
            size = encoder.img_size[0] // scale, encoder.img_size[1] // scale
            attns = [block.attn for block in layer.blocks]
            kinds = ["shifted" if any(attn.shift_size) else "plain" for attn in attns]
            self.kinds += [(kind, stage) for kind in kinds]
            self.padded.append(any(size[i] % attns[0].window_size[i] for i in (0, 1)))
            for kind, attn in dict(zip(kinds, attns, strict=True)).items():
                for name, table in zip(("column", "inner", "groups"), _tables(size, self.edges[-1], attn), strict=True):
                    self.register_buffer(f"{kind}_{name}_{stage}", table, persistent=False)

    def forward(self, keep: Tensor) -> Visible:
        """Of the columns (B, U) int64, each number once in its image."""
        batch, shown = keep.shape
        order = torch.arange(shown, device=keep.device).expand(batch, shown)
        rank = keep.new_full((batch, self.count), -1).scatter(1, keep, order)
        rank = torch.cat((rank, keep.new_full((batch, 1), -2)), 1)
        found = {kind: self._windows(rank, *kind) for kind in dict.fromkeys(self.kinds)}
        return Visible(keep, [found[kind] for kind in self.kinds])

    def _windows(self, rank: Tensor, kind: str, stage: int) -> Windows:
        column, inner, groups = (getattr(self, f"{kind}_{name}_{stage}") for name in ("column", "inner", "groups"))
        place = rank[:, column]
        slots = torch.where(place < 0, place, place * self.edges[stage] ** 2 + inner)
        places = (slots == -1).to(torch.uint8).argsort(dim=2, stable=True)
        return Windows(slots.gather(2, places), places, groups, self.padded[stage])


def _tables(size: Pair, edge: int, attn: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """For each place (W, N) of the windows over a map: its column, its number in that column, its group of the shift.

    Padding is a column of its own, behind all others.
    """
    rows, columns = (torch.arange(length, device="cpu") for length in size)
    column = rows[:, None] // edge * (size[1] // edge) + columns // edge
    inner = rows[:, None] % edge * edge + columns % edge
    pad = -size[0] % attn.window_size[0], -size[1] % attn.window_size[1]
    last = column.max() + 1

    def placed(values: Tensor) -> Tensor:
        padded = pad_shifted(values[None, ..., None], pad, attn.padded_after_shift)
        rolled = torch.roll(padded, (-attn.shift_size[0], -attn.shift_size[1]), (1, 2))
        return partition(rolled, attn.window_size)[..., 0]

    groups = None
    if any(attn.shift_size):
        found = shift_groups(size[0] + pad[0], size[1] + pad[1], attn.shift_size, column.device)
        groups = partition(found[None, ..., None], attn.window_size)[..., 0]
    # Zeros are padding.
    return last + placed(column - last), placed(inner), groups
