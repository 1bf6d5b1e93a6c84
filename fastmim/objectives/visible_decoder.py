"""What predicts hidden tokens where the encoder has not seen their places: a few blocks over all of the last map."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..models.layers import to_pair, trunc_normal_
from ..models.positions import sincos_positions
from ..models.rules import encoder_stride
from ..models.stream import Step, stream_dtype
from ..models.vit import NORM_EPS, Attention, VitBlock, run_blocks


class VisibleDecoder(nn.Module):
    """Mask tokens at hidden places, fixed sine and cosine positions, transformer blocks (MAE, He et al. 2022, 3).

    GreenMIM (Huang et al. 2022, section 4.1) puts one block of 512 channels and 16 heads behind a Swin.

    Args:
        in_dim: Channels of the encoder's tokens.
        grid: (h, w) of the map.
        dim, depth, num_heads: Of the blocks.
    """

    positions: Tensor

    def __init__(
        self, in_dim: int, grid: tuple[int, int], *, dim: int, depth: int, num_heads: int, impl: str = "auto"
    ) -> None:
        super().__init__()
        self.grid, self.impl = grid, impl
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.register_buffer("positions", sincos_positions(grid, dim)[0, 1:], persistent=False)
        self.blocks = nn.ModuleList(
            VitBlock(dim, Attention(dim, num_heads, True, True, None), 4.0, None) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02, bound=2.0)
                nn.init.zeros_(module.bias)
        trunc_normal_(self.mask_token, std=0.02, bound=2.0)

    def forward(self, tokens: Tensor, keep: Tensor) -> Tensor:
        """Visible (B, U, in_dim) tokens and their numbers (B, U) in the map → (B, h, w, dim) of all."""
        embedded = self.embed(tokens)
        everywhere = self.mask_token.to(embedded.dtype).expand(len(keep), math.prod(self.grid), -1)
        x = everywhere.scatter(1, keep[..., None].expand_as(embedded), embedded) + self.positions
        drops = [(None, None)] * len(self.blocks)
        _, y = run_blocks(x.to(stream_dtype(x, "auto")), self.blocks, self.norm, drops, Step(self.impl))
        return y.unflatten(1, self.grid)


def decoder_untrained(norm: nn.LayerNorm) -> str | None:
    """"the decoder" where its last norm is still as it was made; ZeRO-3, which hands out parts, leaves it open.

    What is loaded of a trained decoder, and every update at a rate above 0, is something else.
    """
    made = norm.weight.numel() > 0 and bool((norm.weight == 1).all()) and not bool(norm.bias.any())
    return "the decoder" if made else None


def check_visible(settings: Mapping[str, Any], unit: int) -> None:
    """The encoder is a Swin, and units and images are whole tokens of its last map.

    Args:
        settings: Of :func:`fastmim.models.encoder_settings`.
        unit: Edge of a mask unit in pixels.

    Raises:
        ValueError: Names the key and the nearest value.
    """
    if settings["name"] not in ("swin", "swinv2"):
        raise ValueError(f"visible_only=true: {settings['name']} has no windows of visible tokens; use swin or swinv2")
    stride = encoder_stride(settings)
    if unit % stride:
        near = max(round(unit / stride), 1) * stride
        raise ValueError(f"unit={unit}: visible_only needs a multiple of the encoder's stride {stride}; use {near}")
    check_whole(settings["img_size"], unit, f"visible_only needs a multiple of unit {unit}")


def check_whole(img_size: int | tuple[int, int], edge: int, need: str) -> None:
    """An image is whole squares of ``edge`` pixels.

    Raises:
        ValueError: Says what is needed, and names the nearest sizes.
    """
    size = to_pair(img_size, "img_size")
    if size[0] % edge or size[1] % edge:
        low, high = ([max(f(length / edge), 1) * edge for length in size] for f in (math.floor, math.ceil))
        options = dict.fromkeys(str(s[0] if size[0] == size[1] else s) for s in (low, high))
        shown = size[0] if size[0] == size[1] else list(size)
        raise ValueError(f"img_size={shown}: {need}; use {' or '.join(options)}")


def check_decoder(dim: int, depth: int, num_heads: int) -> None:
    """Positions take a multiple of four channels, heads divide them, and there is a block.

    Raises:
        ValueError: Names the key and the nearest value.
    """
    if depth < 1:
        raise ValueError(f"decoder_depth={depth}: must be 1 or more")
    if dim < 4 or dim % 4:
        raise ValueError(f"decoder_dim={dim}: must be a multiple of 4; use {max(round(dim / 4), 1) * 4}")
    if num_heads < 1 or dim % num_heads:
        near = min((n for n in range(1, dim + 1) if dim % n == 0), key=lambda n: abs(n - num_heads))
        raise ValueError(f"decoder_num_heads={num_heads}: does not divide decoder_dim={dim}; use {near}")
