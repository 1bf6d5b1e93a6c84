"""Swin and SwinV2 encoders with a mask token, on timm's parameter names."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import fastmim_kernels as fk

from .layers import (
    RESIDUAL_DTYPES,
    DropPaths,
    PatchEmbed,
    drop_path_rates,
    joint_bias,
    relative_position_index,
    stream_dtype,
    to_pair,
    trunc_normal_,
)
from .swin_block import PatchMerging, Shared, SwinBlock, WindowAttention, init_attention, normalise

Pair = tuple[int, int]


def relative_coords_table(window_size: Pair, pretrained_window_size: Pair) -> Tensor:
    """((2·wh − 1)(2·ww − 1), 2) log-spaced relative coordinates of SwinV2 (section 3.3, equation 4)."""
    axes = []
    for size, pretrained in zip(window_size, pretrained_window_size, strict=True):
        # A window of one token has the single offset 0.
        r = torch.arange(1 - size, size, dtype=torch.float32, device="cpu") / max((pretrained or size) - 1, 1)
        axes.append(r.sign() * torch.log2(1 + 8 * r.abs()) / math.log2(8))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)


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
        pretrained_window_size: Pair,
        mlp_ratio: float,
        qkv_bias: bool,
        version: int,
        extra_norm: list[bool],
        impl: str,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads}: must divide the stage's {dim} channels")
        self.version, self.impl = version, impl
        # A window larger than the map shrinks to it, and then there is nothing to shift.
        window = (min(window_size[0], resolution[0]), min(window_size[1], resolution[1]))
        shift = tuple(0 if r <= w else w // 2 for r, w in zip(resolution, window, strict=True))
        self.downsample = PatchMerging(dim // 2, version, impl) if downsample else nn.Identity()
        self.blocks = nn.ModuleList(
            SwinBlock(
                dim,
                WindowAttention(dim, num_heads, window, shift if i % 2 else (0, 0), qkv_bias, version, impl),
                mlp_ratio,
                version,
                extra_norm[i],
            )
            for i in range(depth)
        )
        self.register_buffer("bias_index", relative_position_index(window), persistent=False)
        if version == 2:
            self.register_buffer("coords", relative_coords_table(window, pretrained_window_size), persistent=False)

    def position_bias(self) -> Tensor:
        """(depth, heads, N, N) additive attention bias of every block, in one evaluation."""
        attns = [block.attn for block in self.blocks]
        if self.version == 2:
            return fk.cpb_bias(
                self.coords,
                self.bias_index,
                torch.stack([a.cpb_mlp[0].weight for a in attns]),
                torch.stack([a.cpb_mlp[0].bias for a in attns]),
                torch.stack([a.cpb_mlp[2].weight for a in attns]),
                impl=self.impl,
            )
        tables = torch.stack([a.relative_position_bias_table.T for a in attns])
        return tables.index_select(2, self.bias_index.reshape(-1)).unflatten(2, self.bias_index.shape)

    def qkv_biases(self) -> list[Tensor | None]:
        """(3C,) of each block."""
        attns = [block.attn for block in self.blocks]
        return [a.qkv.bias if self.version == 1 else joint_bias(a.q_bias, a.v_bias) for a in attns]

    def forward(
        self, x: Tensor, drop: list[tuple[Tensor | None, Tensor | None]], final_norm: nn.LayerNorm | None = None
    ) -> Tensor:
        """The stage's map; with ``final_norm``, normalised by it."""
        y = x
        if not isinstance(self.downsample, nn.Identity):
            x, y = self.downsample(x)
        pre = self.version == 1
        if pre:
            x, y = normalise(x, self.blocks[0].norm1, self.impl)
        norms = [block.norm1 for block in self.blocks[1:]] + [final_norm]
        shared = map(Shared, self.position_bias().unbind(0), self.qkv_biases(), drop)
        for block, own, norm in zip(self.blocks, shared, norms, strict=True):
            x, y = block(x, y, own, norm if pre else None)
        if pre:
            return y
        if final_norm is None:
            return x
        return fk.layer_norm(x, final_norm.weight, final_norm.bias, eps=final_norm.eps, impl=self.impl)


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
        self.grid = _grid(self.img_size, patch_size)
        if len(depths) != len(num_heads):
            raise ValueError(f"num_heads={tuple(num_heads)}: must have one entry per stage, depths={tuple(depths)}")
        self.version, self.impl = version, impl
        self.patch_size, self.in_chans, self.embed_dim = patch_size, in_chans, embed_dim
        self.stride = patch_size * 2 ** (len(depths) - 1)
        self.num_features = embed_dim * 2 ** (len(depths) - 1)
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, norm=True)
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.drop_paths = DropPaths(drop_path_rates(drop_path_rate, sum(depths)))
        extra = _extra_norms(depths, extra_norm_period, extra_norm_scope)
        pretrained = _per_stage(pretrained_window_size, len(depths))
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
                    resolution=(math.ceil(self.grid[0] / 2**s), math.ceil(self.grid[1] / 2**s)),
                    impl=impl,
                    window_size=to_pair(window_size, "window_size"),
                    pretrained_window_size=(pretrained[s],) * 2,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    extra_norm=extra[first : first + depth],
                )
            )
        self.norm = nn.LayerNorm(self.num_features)
        self.reset_parameters()

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, H, W) images and (B, H/p, W/p) mask → (B, h, w, num_features) tokens of ``stride`` pixels."""
        x = self._embed(images, mask)
        drop = self.drop_paths(x.shape[0])
        for layer in self.layers:
            own, drop = drop[: len(layer.blocks)], drop[len(layer.blocks) :]
            x = layer(x, own, self.norm if layer is self.layers[-1] else None)
        return x

    def _embed(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """The first residual stream."""
        x, norm = self.patch_embed.project(images), self.patch_embed.norm
        dtype, eps = stream_dtype(x, self.residual_dtype), norm.eps
        if mask is None:
            return fk.layer_norm(x, norm.weight, norm.bias, eps=eps, out_dtype=dtype, impl=self.impl)
        return fk.mask_tokens(
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


def _grid(img_size: Pair, patch_size: int) -> Pair:
    if img_size[0] % patch_size or img_size[1] % patch_size:
        raise ValueError(f"img_size={img_size}: both edges must be multiples of patch_size={patch_size}")
    return img_size[0] // patch_size, img_size[1] // patch_size


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
