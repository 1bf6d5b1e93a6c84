"""The SwinV2 encoder with a mask token, on timm's parameter names: what differs from Swin (Liu et al. 2022)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import fastmim_kernels as fk

from .stream import Step, start_stream, weight_and_bias
from .swin import Pair, PatchMerging, SwinBlock, SwinStage, SwinTransformer
from .swin_shared import relative_coords_table
from .window_attention import WindowAttention


class CosineWindowAttention(WindowAttention):
    """Scaled cosine attention, with position biases of a small MLP on log-spaced offsets (section 3.3)."""

    def add_parameters(self, dim: int, qkv_bias: bool) -> None:
        self.logit_scale = nn.Parameter(torch.empty(self.num_heads, 1, 1))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, self.num_heads, bias=False))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.empty(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.empty(dim)) if qkv_bias else None

    def reset_parameters(self) -> None:
        nn.init.constant_(self.logit_scale, math.log(10))
        for bias in (self.q_bias, self.v_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def bias_parameters(self) -> tuple[Any, ...]:
        first, _, second = self.cpb_mlp
        return *weight_and_bias(first), weight_and_bias(second)[0]


class SwinV2Block(SwinBlock):
    """x + LN(attention(x)), then x + LN(MLP(x)) (figure 1); now and then, in H and G, LN of that."""

    def forward(self, x: Tensor, y: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """The (B, H, W, C) stream, for its two readers (y in the dtype of the products), to the next one likewise."""
        own, last = self._modules, self.norm3 is None
        attn, mlp = own["attn"], own["mlp"]
        first = attn, step.behind(own["norm1"], attn._modules["proj"], step.drop_attn, "post")
        merge = step.merge and last
        second = mlp, step.behind(own["norm2"], mlp._modules["fc2"], step.drop_mlp, "post", merge=merge)
        x, y = step.add_branches(x, y, first, second)
        return (x, y) if last else start_stream(x, self.norm3, x.dtype, step.impl, step.merge)


class PatchMergingV2(PatchMerging):
    """The norm comes after the reduction."""

    def __init__(self, dim: int, impl: str) -> None:
        super().__init__(dim, impl, norm_dim=2 * dim)

    def forward(self, x: Tensor, dtype: torch.dtype, low_weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """As Swin's; the map may be gathered to (B, H/2, W/2, 4C) already, where the last block wrote it."""
        weight = self.reduction.weight
        x = x if x.shape[-1] == weight.shape[1] else fk.patch_merge(x, impl=self.impl)
        return start_stream(fk.linear(x, weight, low_weight=low_weight, impl=self.impl), self.norm, dtype, self.impl)


class SwinV2Stage(SwinStage):
    """A stage of res-post-norm blocks; the last one gathers its map for the merging of the next stage."""

    attention, block, merging = CosineWindowAttention, SwinV2Block, PatchMergingV2

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        steps: list[Step],
        dtype: torch.dtype,
        low_reduction: Tensor | None,
        final_norm: nn.LayerNorm | None,
    ) -> Tensor:
        x, y = self.enter(x, y, dtype, low_reduction)
        even = x.shape[1] % 2 == x.shape[2] % 2 == 0
        last = steps[-1]._replace(merge=even and final_norm is None)
        for block, step in zip(self.blocks, [*steps[:-1], last], strict=True):
            x, y = block(x, y, step)
        if final_norm is None:
            return x
        return fk.layer_norm(x, final_norm.weight, final_norm.bias, eps=final_norm.eps, impl=last.impl)


class SwinTransformerV2(SwinTransformer):
    """SwinV2 encoder, of the same arguments as :class:`.SwinTransformer`."""

    stage = SwinV2Stage

    def coordinates(self, windows: list[Pair], pretrained_windows: list[int]) -> list[Tensor]:
        return [relative_coords_table(own, (p, p)) for own, p in zip(windows, pretrained_windows, strict=True)]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As Swin's; the norms of the blocks start at 0, so that each block starts as the identity."""
        super().reset_parameters()
        for norm in (norm for block in self.all_blocks() for norm in (block.norm1, block.norm2)):
            nn.init.zeros_(norm.weight)
            nn.init.zeros_(norm.bias)
