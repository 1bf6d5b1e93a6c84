"""Vision Transformer with relative position bias and a mask token, on the parameter names of timm's ``beit``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmim_kernels as fk

from .attend import attend
from .features import Pooled, pooled_features
from .layers import (
    DropPaths,
    Mlp,
    PatchEmbed,
    drop_path_rates,
    to_pair,
)
from .positions import (
    RelativePositionBias,
    absolute_positions,
    bias_table,
    check_positions,
    cls_position_index,
    look_up,
    resize_positions,
)
from .read_rows import put
from .rules import check_heads, patch_grid
from .stream import Step, check_residual_dtype, normalise, stream_dtype
from .vit_init import check_init, init_vit

NORM_EPS = 1e-6


class Attention(nn.Module):
    """Global attention with an additive bias; queries and values have a bias, keys with ``key_bias`` only."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, key_bias: bool, grid: tuple[int, int] | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias and key_bias)
        apart = qkv_bias and not key_bias
        self.q_bias = nn.Parameter(torch.zeros(dim)) if apart else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if apart else None
        self.relative_position_bias_table = None if grid is None else bias_table(grid, num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, y: Tensor, index: Tensor | None, *, step: Step) -> Tensor:
        """(B, N, C) → (B, N, C), or the rows that ``step`` wants; ``index`` are the rows of an own table of biases."""
        b, n, c = y.shape
        qkv = F.linear(y, self.qkv.weight, self._qkv_bias())
        q, k, v = qkv.reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        bias = step.bias
        if self.relative_position_bias_table is not None:
            own = look_up(self.relative_position_bias_table, index)
            bias = own if bias is None else own + bias
        out = attend(q, k, v, bias)
        return self.proj(step.take(out.transpose(1, 2).reshape(b, n, c)))

    def class_weights(self, y: Tensor) -> Tensor:
        """(B, N, C) → (B, heads, N − 1): how much the class token, which is the first, attends to each other one."""
        b, n, c = y.shape
        qkv = F.linear(y, self.qkv.weight, self._qkv_bias())
        q, k, _ = qkv.reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4).float().unbind(0)
        logits = (q[:, :, :1] * q.shape[-1] ** -0.5) @ k.mT
        return logits.softmax(-1)[:, :, 0, 1:]

    def _qkv_bias(self) -> Tensor | None:
        if self.q_bias is None:
            return self.qkv.bias
        return torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))


class VitBlock(nn.Module):
    """x + γ₁·attention(LN(x)), then x + γ₂·MLP(LN(x)), with LayerScale γ or without."""

    def __init__(self, dim: int, attn: Attention, mlp_ratio: float, init_values: float | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.gamma_1 = nn.Parameter(torch.full((dim,), init_values)) if init_values else None
        self.gamma_2 = nn.Parameter(torch.full((dim,), init_values)) if init_values else None

    def forward(self, x: Tensor, y: Tensor, index: Tensor | None, step: Step) -> tuple[Tensor, Tensor]:
        """The (B, N, C) stream x and ``y = norm1(x)`` → the stream and ``step.next_norm`` of it."""
        branch = self.attn(y, index, step=step)
        x, y = step.add_norm(step.take(x), branch, self.norm2, self.attn.proj, step.drop_attn, self.gamma_1)
        return step.add_branches(
            x, y, (self.mlp, step.behind(step.next_norm, self.mlp.fc2, step.drop_mlp, "pre", self.gamma_2))
        )


class VisionTransformer(nn.Module):
    """ViT encoder of SimMIM and BEiT; with ``key_bias`` and ``abs_pos_embed`` the plain one of DINO and iBOT.

    Args:
        img_size: Pixels, an integer or (height, width); ``patch_size`` divides both.
        key_bias: Keys have a bias too, in one ``qkv.bias`` as in timm's ``vit``; else in timm's ``beit``'s way.
        init_values: Start of LayerScale; None for none.
        shared_rel_pos_bias: One relative position bias for all blocks (SimMIM pretraining).
        rel_pos_bias: One per block.
        abs_pos_embed: Absolute positions: learned, or fixed as "sincos" (MAE) or "sincos_moco" (MoCo v3), see
            :func:`.positions.sincos_positions`; interpolated for images of another size.
        init: Of the weights, a key of :data:`.vit_init.INITS`.
        residual_dtype: "auto" or "fp32", see :func:`fastmim.models.stream.stream_dtype`.
    """

    #: What it was built from, of :func:`fastmim.models.encoder_settings`.
    settings: dict[str, Any]

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        key_bias: bool = False,
        drop_path_rate: float = 0.0,
        init_values: float | None = None,
        shared_rel_pos_bias: bool = False,
        rel_pos_bias: bool = False,
        abs_pos_embed: bool | str = False,
        init: str = "simmim",
        residual_dtype: str = "auto",
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_init(init)
        check_positions(abs_pos_embed, embed_dim)
        self.impl, self.residual_dtype = fk.check_impl(impl), check_residual_dtype(residual_dtype)
        check_heads(num_heads, embed_dim)
        self.img_size = to_pair(img_size, "img_size")
        self.grid = patch_grid(self.img_size, patch_size)
        self.patch_size = self.stride = patch_size
        self.in_chans, self.embed_dim, self.num_features = in_chans, embed_dim, embed_dim
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, norm=False, impl=impl)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = absolute_positions(abs_pos_embed, self.grid, embed_dim)
        self.rel_pos_bias = RelativePositionBias(self.grid, num_heads) if shared_rel_pos_bias else None
        index = cls_position_index(self.grid) if shared_rel_pos_bias or rel_pos_bias else None
        self.register_buffer("bias_index", index, persistent=False)
        self.drop_paths = DropPaths(drop_path_rates(drop_path_rate, depth))
        self.blocks = nn.ModuleList(
            VitBlock(
                embed_dim,
                Attention(embed_dim, num_heads, qkv_bias, key_bias, self.grid if rel_pos_bias else None),
                mlp_ratio,
                init_values,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        init_vit(self, init)

    def forward(self, images: Tensor, mask: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """(B, C, H, W) images and (B, H/p, W/p) mask → (B, H/p, W/p, embed_dim) patch tokens (no class token).

        With ``rows`` only patch tokens of these numbers are meant to be read; the others are zero.
        """
        if rows is None:
            return self.forward_tokens(images, mask)[1]
        x, grid = self._embed(images, mask)
        # The class token stands before the patches of each sample.
        count = math.prod(grid)
        _, y = self._blocks(x, rows + rows.div(count, rounding_mode="floor") + 1)
        return put(y, rows, (len(images), *grid))

    def forward_tokens(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) images of any size that the patch divides → (B, D) class and (B, H/p, W/p, D) patch tokens."""
        x, grid = self._embed(images, mask)
        _, y = self._blocks(x)
        return y[:, 0], y[:, 1:].unflatten(1, grid)

    def forward_stream(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) → (B, 1 + L, D) tokens after the last block, before the norm and after it."""
        return self._blocks(self._embed(images, None)[0])

    def all_blocks(self) -> list[VitBlock]:
        """Those that :meth:`features` counts."""
        return list(self.blocks)

    def features(self, images: Tensor, last: int = 1, normed: bool = True) -> list[Pooled]:
        """See :func:`.features.pooled_features`."""
        return pooled_features(self, images, last, normed)

    def class_tokens(self, images: Tensor) -> Tensor:
        """The (B, D) of :meth:`forward_tokens` alone: the last block projects no patches, and has no MLP of them."""
        x, _ = self._embed(images, None)
        return self._blocks(x, torch.arange(len(x), device=x.device) * x.shape[1])[1]

    @torch.no_grad()
    def attention(self, images: Tensor) -> Tensor:
        """(B, C, H, W) → (B, heads, H/p, W/p) float32: what the class token attends to in the last block.

        Without relative positions, which no pretraining with a class token has.
        """
        x, grid = self._embed(images, None)
        last: Any = self.blocks[-1]
        before, none = self.blocks[:-1], [(None, None)] * (len(self.blocks) - 1)
        _, y = run_blocks(x, before, last.norm1, none, Step(self.impl), index=self.bias_index)
        return last.attn.class_weights(y).unflatten(2, grid)

    def _embed(self, images: Tensor, mask: Tensor | None) -> tuple[Tensor, tuple[int, int]]:
        """The (B, 1 + L, D) stream that begins with the class token, and the grid of its patches."""
        x = self.patch_embed(images)
        grid = (x.shape[1], x.shape[2])
        if grid != self.grid and self.bias_index is not None:
            raise ValueError(
                f"images of {grid[0]} × {grid[1]} patches: this ViT's relative positions are those of "
                f"{self.grid[0]} × {self.grid[1]}; use absolute ones (model.abs_pos_embed=true)"
            )
        if mask is not None:
            x = fk.mask_tokens(x, mask, self.mask_token, impl=self.impl)
        x = torch.cat((self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x.flatten(1, 2)), 1)
        if self.pos_embed is not None:
            x = x + resize_positions(self.pos_embed, self.grid, grid)
        return x.to(stream_dtype(x, self.residual_dtype)), grid

    def forward_kept(self, pixels: Tensor, keep: Tensor) -> Tensor:
        """Tokens of the kept patches alone, whose pixels are all that is read (MAE, He et al. 2022, section 3).

        Args:
            pixels: (B, K, C·p²) of the kept patches, channel by channel.
            keep: (B, K) int64 numbers of these patches, row by row of the image.

        Returns:
            (B, 1 + K, D): the class token, then the patches in the order of ``keep``.
        """
        x = self.patch_embed.project(pixels)
        x = torch.cat((self.cls_token.to(x.dtype).expand(len(x), -1, -1), x), 1)
        if self.pos_embed is not None:
            x = x + F.embedding(F.pad(keep + 1, (1, 0)), self.pos_embed[0])
        return self._blocks(x.to(stream_dtype(x, self.residual_dtype)))[1]

    def _blocks(self, x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens after all blocks and their norm, or of the last one only these rows of all B·(1 + L)."""
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias(self.bias_index)
        how = Step(self.impl, bias=bias)
        return run_blocks(x, self.blocks, self.norm, self.drop_paths(x.shape[0]), how, index=self.bias_index, rows=rows)

    def set_micro_batch(self, index: int, count: int) -> None:
        """Nothing is kept from one forward pass to the next, see :class:`.swin.SwinTransformer`."""


def run_blocks(
    x: Tensor,
    blocks: nn.ModuleList,
    norm: nn.LayerNorm,
    drops: Sequence[tuple[Tensor | None, Tensor | None]],
    how: Step,
    *,
    index: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(B, N, D) stream → it after all :class:`VitBlock`, and ``norm`` of it.

    Args:
        drops: Of :class:`.layers.DropPaths`.
        how: What all blocks share.
        index: Rows of each block's own table of biases.
        rows: Of all B·N tokens, the only ones that are wanted, which come as (R, D).
    """
    tokens = x.shape[1]
    norms = [*(block.norm1 for block in blocks), norm]
    x, y = normalise(x, norms[0], how.impl)
    steps = [
        how._replace(drop_attn=attn, drop_mlp=mlp, next_norm=after)
        for (attn, mlp), after in zip(drops, norms[1:], strict=True)
    ]
    if rows is not None:
        steps[-1] = steps[-1].only(rows, tokens)
    for block, step in zip(blocks, steps, strict=True):
        x, y = block(x, y, index, step)
    return x, y
