"""The Swin encoder with a mask token, on timm's parameter names (Liu et al. 2021)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import fastmim_kernels as fk

from .features import Pooled, pooled_features
from .layers import Mlp, PatchEmbed, drop_path_rates, to_pair, trunc_normal_
from .read_rows import put
from .rules import check_stages, patch_grid, window_sizes
from .stream import Step, check_residual_dtype, normalise, start_stream, stream_dtype, weight_and_bias
from .swin_shared import SharedInputs
from .visible import Visible
from .window_attention import WindowAttention

Pair = tuple[int, int]


class SwinBlock(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)) (figure 3b); with ``extra_norm`` LN of that."""

    def __init__(self, dim: int, attn: WindowAttention, mlp_ratio: float, extra_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.norm3 = nn.LayerNorm(dim) if extra_norm else None

    def forward(self, x: Tensor, y: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """The (B, H, W, C) stream x and ``y = norm1(x)`` → the stream and ``step.next_norm`` of it, if there is one."""
        attn, mlp = self.attn, self.mlp
        first = attn, step.behind(self.norm2, attn.proj, step.drop_attn, "pre")
        if self.norm3 is None and step.next_norm is not None:
            return step.add_branches(x, y, first, (mlp, step.behind(step.next_norm, mlp.fc2, step.drop_mlp, "pre")))
        x, y = step.add_branches(x, y, first)
        x = step.add(x, mlp(y, step=step.alone()), step.drop_mlp)
        if self.norm3 is not None:
            x, _ = start_stream(x, self.norm3, x.dtype, step.impl)
        return (x, x) if step.next_norm is None else normalise(x, step.next_norm, step.impl)

    def weights(self) -> list[Tensor]:
        """Those of the four products."""
        own = self._modules
        attn, mlp = own["attn"]._modules, own["mlp"]._modules
        return [weight_and_bias(layer)[0] for layer in (attn["qkv"], attn["proj"], mlp["fc1"], mlp["fc2"])]


class PatchMerging(nn.Module):
    """2×2 tokens → their LN → one token of twice the channels."""

    def __init__(self, dim: int, impl: str, norm_dim: int | None = None) -> None:
        super().__init__()
        self.impl = impl
        self.norm = nn.LayerNorm(norm_dim or 4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor, dtype: torch.dtype, low_weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, H, W, C) → the (B, ⌈H/2⌉, ⌈W/2⌉, 2C) stream in ``dtype``, for its two readers."""
        norm, weight = self.norm, self.reduction.weight
        merged = fk.patch_merge(x, norm.weight, norm.bias, eps=norm.eps, impl=self.impl)
        x = fk.linear(merged, weight, low_weight=low_weight, impl=self.impl).to(dtype)
        return x, x


class SwinStage(nn.Module):
    """Patch merging (but in the first stage) and the blocks of one resolution.

    Args:
        resolution: (rows, columns) of the map.
        parity: Of each attention.
        extra_norm: Of each block.
    """

    attention, block, merging = WindowAttention, SwinBlock, PatchMerging

    def __init__(
        self,
        dim: int,
        num_heads: int,
        resolution: Pair,
        window_size: Pair,
        mlp_ratio: float,
        qkv_bias: bool,
        parity: bool,
        extra_norm: list[bool],
        impl: str,
        downsample: bool,
    ) -> None:
        super().__init__()
        # A window as large as the map has nothing to shift.
        shift = tuple(0 if r <= w else w // 2 for r, w in zip(resolution, window_size, strict=True))
        self.downsample = self.merging(dim // 2, impl) if downsample else nn.Identity()
        self.blocks = nn.ModuleList()
        for i, extra in enumerate(extra_norm):
            attn = self.attention(dim, num_heads, window_size, shift if i % 2 else (0, 0), qkv_bias, parity)
            self.blocks.append(self.block(dim, attn, mlp_ratio, extra))

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        steps: list[Step],
        dtype: torch.dtype,
        low_reduction: Tensor | None,
        final_norm: nn.LayerNorm | None,
    ) -> Tensor:
        """The stage's map from the one before, x, which y is too.

        Args:
            steps: Of each block.
            dtype: Of the stream.
            low_reduction: The cast weight of the merging, or None.
            final_norm: Normalises the last stage's map; without it, SwinV2's comes gathered 2×2 where it is even.
        """
        x, y = self.enter(x, y, dtype, low_reduction)
        x, y = normalise(x, self.blocks[0].norm1, steps[0].impl)
        norms = [block.norm1 for block in self.blocks[1:]] + [final_norm]
        for block, step, norm in zip(self.blocks, steps, norms, strict=True):
            x, y = block(x, y, step._replace(next_norm=norm))
        return y

    def enter(
        self, x: Tensor, y: Tensor, dtype: torch.dtype, low_reduction: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The stream of this stage's resolution."""
        return (x, y) if isinstance(self.downsample, nn.Identity) else self.downsample(x, dtype, low_reduction)


class SwinTransformer(nn.Module):
    """Swin encoder that replaces masked patches by a mask token.

    Args:
        img_size: Pixels, an integer or (height, width); ``patch_size`` divides both.
        window_size: Tokens, an integer or (rows, columns); shrinks to a smaller map, pads a map it does not divide.
        pretrained_window_size: SwinV2: the window the position bias was trained with (an integer, or one per
            stage); 0 means ``window_size``.
        extra_norm_period: Every so many blocks a LayerNorm on the residual stream (SwinV2-H and -G: 6); 0 = none.
        extra_norm_scope: Count blocks within a "stage" (the public ports) or over the "global" depth.
        norm_eps: Of every LayerNorm; iBOT's Swin has 1e-6.
        policy: "default"; "parity" shifts a map before it pads it, as timm does, see :class:`.WindowAttention`.
        residual_dtype: "auto", or "fp32" for the residual stream that the references have under autocast; see
            :func:`fastmim.models.stream.stream_dtype`.
    """

    stage = SwinStage
    #: What it was built from, of :func:`fastmim.models.encoder_settings`.
    settings: dict[str, Any]

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
        norm_eps: float = 1e-5,
        policy: str = "default",
        residual_dtype: str = "auto",
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.impl, self.residual_dtype = fk.check_impl(impl), check_residual_dtype(residual_dtype)
        self.img_size = to_pair(img_size, "img_size")
        self.grid = patch_grid(self.img_size, patch_size)
        check_stages(num_heads, depths, embed_dim)
        stages = range(len(depths))
        self.patch_size, self.stride = patch_size, patch_size * 2 ** stages[-1]
        self.in_chans, self.embed_dim, self.num_features = in_chans, embed_dim, embed_dim * 2 ** stages[-1]
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, norm=True, impl=impl)
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        extra = _extra_norms(depths, extra_norm_period, extra_norm_scope)
        pretrained = _per_stage(pretrained_window_size, len(depths))
        maps = [(math.ceil(self.grid[0] / 2**s), math.ceil(self.grid[1] / 2**s)) for s in stages]
        windows = window_sizes(dict(img_size=img_size, patch_size=patch_size, window_size=window_size, depths=depths))
        how = mlp_ratio, qkv_bias, _is_parity(policy)
        own = [(embed_dim * 2**s, num_heads[s], maps[s], windows[s], *how, extra[s]) for s in stages]
        self.layers = nn.ModuleList(self.stage(*own[s], impl, downsample=s > 0) for s in stages)
        self.last_map = maps[-1]
        rates = drop_path_rates(drop_path_rate, sum(depths))
        coordinates = self.coordinates(windows, pretrained)
        self.shared = SharedInputs(windows, depths, num_heads, coordinates, rates, self.num_features, impl)
        self.norm = nn.LayerNorm(self.num_features)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = norm_eps
        self.reset_parameters()

    def coordinates(self, windows: list[Pair], pretrained_windows: list[int]) -> list[Tensor] | None:
        """Of each stage, where an MLP makes the position biases from offsets; None for tables."""
        return None

    def all_blocks(self) -> list[SwinBlock]:
        """Those of all stages."""
        return [block for layer in self.layers for block in layer.blocks]

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        rows: Tensor | None = None,
        visible: Visible | None = None,
    ) -> Tensor:
        """(B, C, H, W) images and (B, H/p, W/p) mask → (B, h, w, num_features) tokens of ``stride`` pixels.

        With ``rows`` only tokens of these numbers are meant to be read; the others are zero. With ``visible`` only
        these are computed, from their own pixels, and attend to each other: (B, U, num_features).
        """
        patches = self.patch_embed.patches(images if visible is None else visible.pixels(images, self.stride))
        proj, reductions = self.patch_embed.proj, [layer.downsample.reduction.weight for layer in self.layers[1:]]
        steps, low = self.shared(self.all_blocks(), [proj.weight.flatten(1), proj.bias, *reductions], patches)
        steps = steps if visible is None else visible.into(steps)
        if rows is not None:
            steps[-1] = steps[-1].only(rows, math.prod(self.last_map))
        dtype = stream_dtype(patches, self.residual_dtype)
        x, y = self._start(self.patch_embed.project(patches, *low[:2]), mask, dtype)
        norms = [None] * (len(self.layers) - 1) + [self.norm]
        for layer, low_reduction, norm in zip(self.layers, [None, *low[2:]], norms, strict=True):
            own, steps = steps[: len(layer.blocks)], steps[len(layer.blocks) :]
            x = y = layer(x, y, own, dtype, low_reduction, norm)
        if visible is not None:
            return x.flatten(1, 2)
        return x if rows is None else put(x, rows, (len(images), *self.last_map))

    def forward_tokens(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) images of any size that the patch divides → (B, D) class and (B, h, w, D) patch tokens.

        The class token is the mean of the patches'. Windows stay those of ``img_size``: a smaller map is padded with
        zeros, as any map that they do not divide.
        """
        x = self(images, mask)
        return x.mean((1, 2)), x

    def features(self, images: Tensor, last: int = 1, normed: bool = True) -> list[Pooled]:
        """See :func:`.features.pooled_features`."""
        return pooled_features(self, images, last, normed)

    def class_tokens(self, images: Tensor) -> Tensor:
        """The (B, D) of :meth:`forward_tokens` alone."""
        return self.forward_tokens(images)[0]

    @torch.no_grad()
    def attention(self, images: Tensor) -> Tensor:
        """(B, C, H, W) → (B, 1, h, w) float32: cosine of each token and their mean, from which 0 is cut.

        Swin has no class token whose attention could be shown.
        """
        mean, tokens = self.forward_tokens(images)
        return torch.cosine_similarity(tokens.float(), mean.float()[:, None, None], dim=-1).clamp(min=0)[:, None]

    def set_micro_batch(self, index: int, count: int) -> None:
        """See :meth:`SharedInputs.set_micro_batch`."""
        self.shared.set_micro_batch(index, count)

    def _start(self, x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The residual stream that begins with embedded patches x, for its two readers."""
        norm = self.patch_embed.norm
        if mask is None:
            return start_stream(x, norm, dtype, self.impl)
        how = {"norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps, "out_dtype": dtype}
        return fk.mask_tokens_twice(x, mask, self.mask_token, **how, impl=self.impl)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Microsoft's initialisation, see :func:`init_swin`."""
        init_swin(self)
        trunc_normal_(self.mask_token, std=0.02, bound=2.0)


def init_swin(model: nn.Module) -> None:
    """Truncated normal of std 0.02 cut at ±2 for linear layers and tables of position biases, 0 for biases."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02, bound=2.0)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, WindowAttention):
            module.reset_parameters()


def _per_stage(value: int | tuple[int, ...], stages: int) -> list[int]:
    values = [value] * stages if isinstance(value, int) else list(value)
    if len(values) != stages:
        raise ValueError(f"pretrained_window_size={value!r}: must be an integer or one per stage ({stages})")
    return values


def _is_parity(policy: str) -> bool:
    if policy not in ("default", "parity"):
        raise ValueError(f"policy={policy!r}: must be 'default' or 'parity'")
    return policy == "parity"


def _extra_norms(depths: tuple[int, ...], period: int, scope: str) -> list[list[bool]]:
    """Of each stage, whether its blocks have one."""
    if scope not in ("stage", "global"):
        raise ValueError(f"extra_norm_scope={scope!r}: must be 'stage' or 'global'")
    starts = [sum(depths[:s]) if scope == "global" else 0 for s in range(len(depths))]
    spans = [range(start, start + depth) for start, depth in zip(starts, depths, strict=True)]
    return [[period > 0 and (i + 1) % period == 0 for i in span] for span in spans]
