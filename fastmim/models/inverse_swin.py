"""Swin backwards: from one token of the last map to the map of its first stage, as a head (SimMIM, section 4.1.3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fastmim_kernels as fk
from fastmim_kernels.reference import pixel_shuffle

from .stream import start_stream, stream_dtype
from .swin import Pair, SwinStage, init_swin
from .swin_shared import SharedInputs


class PatchSplitting(nn.Module):
    """One token → 2×2 tokens of half the channels, and their LN: patch merging read backwards."""

    def __init__(self, dim: int, impl: str) -> None:
        super().__init__()
        self.impl = impl
        self.expansion = nn.Linear(dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(dim // 2)

    def forward(self, x: Tensor, dtype: torch.dtype, low_weight: Tensor | None) -> Tensor:
        """(B, H, W, C) → the (B, 2H, 2W, C/2) stream in ``dtype``."""
        x = fk.linear(x, self.expansion.weight, low_weight=low_weight, impl=self.impl)
        x = pixel_shuffle(x, 2).permute(0, 2, 3, 1).contiguous()
        return start_stream(x, self.norm, dtype, self.impl)[0]


class InverseSwin(nn.Module):
    """A linear layer, then the stages of a plain Swin from the last to the first, with patch splitting between them.

    The paper gives its sizes and no code. Each split doubles the map, so that it ends at the stride of the tokens over
    2 to the power of the number of splits, with ``embed_dim`` channels.

    Args:
        in_dim: Channels of the tokens that it gets.
        grid: (rows, columns) of these.
        embed_dim, depths, num_heads: Of the Swin, its first stage first.
        window_size: In tokens; shrinks to a smaller map, pads one that it does not divide.
        residual_dtype: See :func:`.stream.stream_dtype`.
    """

    def __init__(
        self,
        in_dim: int,
        grid: Pair,
        *,
        embed_dim: int,
        depths: tuple[int, ...],
        num_heads: tuple[int, ...],
        window_size: Pair,
        mlp_ratio: float = 4.0,
        residual_dtype: str = "auto",
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.impl, self.residual_dtype = impl, residual_dtype
        depths, num_heads, stages = depths[::-1], num_heads[::-1], range(len(depths))
        dims = [embed_dim * 2**s for s in reversed(stages)]
        maps = [(grid[0] * 2**s, grid[1] * 2**s) for s in stages]
        windows = [(min(window_size[0], rows), min(window_size[1], columns)) for rows, columns in maps]
        how = mlp_ratio, True, False
        own = [(dims[s], num_heads[s], maps[s], windows[s], *how, [False] * depths[s]) for s in stages]
        self.embed = nn.Linear(in_dim, dims[0])
        self.layers = nn.ModuleList(SwinStage(*own[s], impl, downsample=False) for s in stages)
        self.splits = nn.ModuleList(PatchSplitting(dim, impl) for dim in dims[:-1])
        self.shared = SharedInputs(windows, depths, num_heads, None, [0.0] * sum(depths), dims[0], impl)
        self.norm = nn.LayerNorm(embed_dim)
        init_swin(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, h, w, in_dim) → (B, h·2ⁿ, w·2ⁿ, embed_dim) after n splits, normed."""
        embed, layers, splits = self.embed, list(self.layers), list(self.splits)
        weights = [embed.weight, embed.bias, *(split.expansion.weight for split in splits)]
        blocks: list[Any] = [block for layer in layers for block in layer.blocks]
        steps, low = self.shared(blocks, weights, tokens)
        dtype = stream_dtype(tokens, self.residual_dtype)
        x = fk.linear(tokens, embed.weight, embed.bias, low_weight=low[0], low_bias=low[1], impl=self.impl).to(dtype)
        for i, layer in enumerate(layers):
            if i:
                x = splits[i - 1](x, dtype, low[i + 1])
            own, steps = steps[: len(layer.blocks)], steps[len(layer.blocks) :]
            x = layer(x, x, own, dtype, None, self.norm if layer is layers[-1] else None)
        return x
