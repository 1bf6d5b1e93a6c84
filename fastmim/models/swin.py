"""Swin and SwinV2 encoders with a mask token, on timm's parameter names."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import fastmim_kernels as fk

from .layers import (
    RESIDUAL_DTYPES,
    PatchEmbed,
    drop_path_rates,
    stream_dtype,
    to_pair,
    trunc_normal_,
)
from .read_rows import put
from .rules import check_stages, patch_grid
from .swin_block import PatchMerging, SwinBlock, WindowAttention, init_attention, normalise, start_stream
from .swin_shared import Shared, SharedInputs

Pair = tuple[int, int]


class SwinStage(nn.Module):
    """Patch merging (but in the first stage) and the blocks of one resolution."""

    def __init__(
        self,
        *,
        dim: int,
        downsample: bool,
        resolution: Pair,
        depth: int,
        num_heads: int,
        window_size: Pair,
        mlp_ratio: float,
        qkv_bias: bool,
        version: int,
        extra_norm: list[bool],
        impl: str,
    ) -> None:
        super().__init__()
        self.version, self.impl = version, impl
        # A window as large as the map has nothing to shift.
        shift = tuple(0 if r <= w else w // 2 for r, w in zip(resolution, window_size, strict=True))
        self.downsample = PatchMerging(dim // 2, version, impl) if downsample else nn.Identity()
        self.blocks = nn.ModuleList(
            SwinBlock(
                dim,
                WindowAttention(dim, num_heads, window_size, shift if i % 2 else (0, 0), qkv_bias, version, impl),
                mlp_ratio,
                version,
                extra_norm[i],
            )
            for i in range(depth)
        )

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        shared: list[Shared],
        dtype: torch.dtype,
        low_reduction: Tensor | None,
        final_norm: nn.LayerNorm | None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The stage's map from the one before, x, which y is too.

        Args:
            shared: Of each block.
            dtype: Of the stream.
            low_reduction: The cast weight of the merging, or None.
            final_norm: Normalises the last stage's map; without it, SwinV2's comes gathered 2×2 where it is even.
            rows: Numbers of the only tokens that are read; the others' are zero.
        """
        if not isinstance(self.downsample, nn.Identity):
            x, y = self.downsample(x, dtype, low_reduction)
        pre = self.version == 1
        if pre:
            x, y = normalise(x, self.blocks[0].norm1, self.impl)
        norms = [block.norm1 for block in self.blocks[1:]] + [final_norm]
        shape = x.shape[:-1]
        gathers = not pre and final_norm is None and x.shape[1] % 2 == x.shape[2] % 2 == 0
        for block, own, norm in zip(self.blocks, shared, norms, strict=True):
            last = block is self.blocks[-1]
            x, y = block(x, y, own, norm if pre else None, gathers and last, rows if last else None)
        if final_norm is None:
            return y if pre else x
        if not pre:
            y = fk.layer_norm(x, final_norm.weight, final_norm.bias, eps=final_norm.eps, impl=self.impl)
        return y if rows is None else put(y, rows, shape)


class SwinTransformer(nn.Module):
    """Swin (``version=1``) or SwinV2 (``version=2``) encoder that replaces masked patches by a mask token.

    Args:
        img_size: Pixels, an integer or (height, width); ``patch_size`` divides both.
        window_size: Tokens, an integer or (rows, columns); shrinks to a smaller map, pads a map it does not divide.
        pretrained_window_size: SwinV2: the window the position bias was trained with (an integer, or one per
            stage); 0 means ``window_size``.
        extra_norm_period: Every so many blocks a LayerNorm on the residual stream (SwinV2-H and -G: 6); 0 = none.
        extra_norm_scope: Count blocks within a "stage" (the public ports) or over the "global" depth.
        residual_dtype: "auto", or "fp32" for the residual stream that the references have under autocast; see
            :func:`fastmim.models.layers.stream_dtype`.
    """

    def __init__(
        self,
        *,
        img_size: int | Pair = 192,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window_size: int | Pair = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        pretrained_window_size: int | tuple[int, ...] = 0,
        extra_norm_period: int = 0,
        extra_norm_scope: str = "stage",
        residual_dtype: str = "auto",
        version: int = 1,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        fk.check_impl(impl)
        if residual_dtype not in RESIDUAL_DTYPES:
            raise ValueError(f"residual_dtype={residual_dtype!r}: must be one of {', '.join(RESIDUAL_DTYPES)}")
        self.residual_dtype = residual_dtype
        self.img_size = to_pair(img_size, "img_size")
        self.grid = patch_grid(self.img_size, patch_size)
        check_stages(num_heads, depths, embed_dim)
        self.version, self.impl = version, impl
        self.patch_size, self.in_chans, self.embed_dim = patch_size, in_chans, embed_dim
        self.stride = patch_size * 2 ** (len(depths) - 1)
        self.num_features = embed_dim * 2 ** (len(depths) - 1)
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, norm=True, impl=impl)
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        extra = _extra_norms(depths, extra_norm_period, extra_norm_scope)
        pretrained = _per_stage(pretrained_window_size, len(depths))
        maps = [(math.ceil(self.grid[0] / 2**s), math.ceil(self.grid[1] / 2**s)) for s in range(len(depths))]
        largest = to_pair(window_size, "window_size")
        # A window larger than the map shrinks to it.
        windows = [(min(largest[0], rows), min(largest[1], columns)) for rows, columns in maps]
        self.layers = nn.ModuleList()
        for s, depth in enumerate(depths):
            first = sum(depths[:s])
            self.layers.append(
                SwinStage(
                    dim=embed_dim * 2**s,
                    downsample=s > 0,
                    depth=depth,
                    num_heads=num_heads[s],
                    version=version,
                    resolution=maps[s],
                    impl=impl,
                    window_size=windows[s],
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    extra_norm=extra[first : first + depth],
                )
            )
        self.shared = SharedInputs(
            windows=windows,
            pretrained_windows=[(p, p) for p in pretrained],
            depths=depths,
            num_heads=num_heads,
            drop_path=drop_path_rates(drop_path_rate, sum(depths)),
            dim=self.num_features,
            version=version,
            impl=impl,
        )
        self.norm = nn.LayerNorm(self.num_features)
        self.reset_parameters()

    def forward(self, images: Tensor, mask: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """(B, C, H, W) images and (B, H/p, W/p) mask → (B, h, w, num_features) tokens of ``stride`` pixels.

        With ``rows`` only tokens of these numbers are meant to be read; the others are zero.
        """
        patches = self.patch_embed.patches(images)
        blocks = [block for layer in self.layers for block in layer.blocks]
        reductions = [layer.downsample.reduction.weight for layer in self.layers[1:]]
        proj = self.patch_embed.proj
        shared, low = self.shared(blocks, [proj.weight.flatten(1), proj.bias, *reductions], patches)
        low_embed, low_reductions = (low[0], low[1]), low[2:]
        x, y = self._embed(patches, low_embed, mask)
        dtype = x.dtype
        for layer, low in zip(self.layers, [None, *low_reductions], strict=True):
            own, shared = shared[: len(layer.blocks)], shared[len(layer.blocks) :]
            end = (self.norm, rows) if layer is self.layers[-1] else (None, None)
            x = y = layer(x, y, own, dtype, low, *end)
        return x

    def set_micro_batch(self, index: int, count: int) -> None:
        """See :meth:`SharedInputs.set_micro_batch`."""
        self.shared.set_micro_batch(index, count)

    def _embed(
        self, patches: Tensor, low: tuple[Tensor | None, Tensor | None], mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The first residual stream, for its two readers."""
        x, norm = self.patch_embed.project(patches, *low), self.patch_embed.norm
        dtype, eps = stream_dtype(x, self.residual_dtype), norm.eps
        if mask is None:
            return start_stream(x, norm, dtype, self.impl)
        return fk.mask_tokens_twice(
            x,
            mask,
            self.mask_token,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            eps=eps,
            out_dtype=dtype,
            impl=self.impl,
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Microsoft's initialisation: truncated normal of std 0.02 cut at ±2; SwinV2's block norms start at 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02, bound=2.0)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, WindowAttention):
                init_attention(module)
            elif isinstance(module, SwinBlock) and self.version == 2:
                for norm in (module.norm1, module.norm2):
                    nn.init.zeros_(norm.weight)
                    nn.init.zeros_(norm.bias)
        trunc_normal_(self.mask_token, std=0.02, bound=2.0)


def _per_stage(value: int | tuple[int, ...], stages: int) -> tuple[int, ...]:
    values = (value,) * stages if isinstance(value, int) else tuple(value)
    if len(values) != stages:
        raise ValueError(f"pretrained_window_size={value!r}: must be an integer or one per stage ({stages})")
    return values


def _extra_norms(depths: tuple[int, ...], period: int, scope: str) -> list[bool]:
    if scope not in ("stage", "global"):
        raise ValueError(f"extra_norm_scope={scope!r}: must be 'stage' or 'global'")
    indices = [i for d in depths for i in range(d)] if scope == "stage" else list(range(sum(depths)))
    return [period > 0 and (i + 1) % period == 0 for i in indices]
