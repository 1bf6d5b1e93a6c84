"""The pieces of a Swin or SwinV2 stage: window attention, the block around it, patch merging."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmim_kernels as fk

from .layers import DropPath, Mlp, joint_bias, trunc_normal_

Pair = tuple[int, int]


class WindowAttention(nn.Module):
    """Window attention of one block; the bias of all blocks of a stage is computed by the stage."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Pair,
        shift_size: Pair,
        qkv_bias: bool,
        version: int,
        impl: str,
    ) -> None:
        super().__init__()
        self.num_heads, self.window_size, self.shift_size, self.impl = (
            num_heads,
            window_size,
            shift_size,
            impl,
        )
        self.logit_scale: Tensor | None = None
        if version == 1:
            entries = (2 * window_size[0] - 1) * (2 * window_size[1] - 1)
            self.relative_position_bias_table = nn.Parameter(torch.empty(entries, num_heads))
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        else:
            self.logit_scale = nn.Parameter(torch.empty(num_heads, 1, 1))
            self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, num_heads, bias=False))
            self.qkv = nn.Linear(dim, 3 * dim, bias=False)
            self.q_bias = nn.Parameter(torch.empty(dim)) if qkv_bias else None
            self.v_bias = nn.Parameter(torch.empty(dim)) if qkv_bias else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        pad = (-height % self.window_size[0], -width % self.window_size[1])
        if any(pad):
            x = self._pad(x, pad)
        qkv_bias = self.qkv.bias if self.logit_scale is None else joint_bias(self.q_bias, self.v_bias)
        qkv = fk.linear(x, self.qkv.weight, qkv_bias, impl=self.impl)
        x = fk.window_attention(
            qkv,
            bias,
            num_heads=self.num_heads,
            window_size=self.window_size,
            shift_size=self.shift_size,
            logit_scale=self.logit_scale,
            impl=self.impl,
        )
        if any(pad):
            x = self._unpad(x, height, width)
        return fk.linear(x, self.proj.weight, self.proj.bias, impl=self.impl)

    def _pad(self, x: Tensor, pad: Pair) -> Tensor:
        """Zeros at the end of the *rolled* map, as timm does, expressed in the layout before the roll."""
        rows, cols = self.shift_size
        x = F.pad(torch.roll(x, (-rows, -cols), (1, 2)), (0, 0, 0, pad[1], 0, pad[0]))
        return torch.roll(x, (rows, cols), (1, 2))

    def _unpad(self, x: Tensor, height: int, width: int) -> Tensor:
        rows, cols = self.shift_size
        x = torch.roll(x, (-rows, -cols), (1, 2))[:, :height, :width]
        return torch.roll(x, (rows, cols), (1, 2))


class SwinBlock(nn.Module):
    """One block: pre-norm (Swin) or res-post-norm (SwinV2), with H/G's optional norm on the residual stream."""

    def __init__(
        self,
        dim: int,
        attn: WindowAttention,
        mlp_ratio: float,
        drop_path: float,
        version: int,
        extra_norm: bool,
    ) -> None:
        super().__init__()
        self.version = version
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), attn.impl)
        self.drop_path = DropPath(drop_path)
        self.norm3 = nn.LayerNorm(dim) if extra_norm else None

    def forward(self, x: Tensor, y: Tensor, bias: Tensor, next_norm: nn.LayerNorm | None) -> tuple[Tensor, Tensor]:
        """One block on the residual stream.

        Args:
            x: (B, H, W, C) residual stream.
            y: What attention reads: ``norm1(x)`` for Swin, x itself for SwinV2, in the dtype of the products.
            bias: (heads, N, N) attention bias.
            next_norm: Swin: the norm that reads this block's result, applied in the pass that adds to the stream.

        Returns:
            The stream, and ``next_norm`` of it (without one, or for SwinV2, the stream again).
        """
        if self.version == 1:
            x, y = self._add(x, self.attn(y, bias), "pre", self.norm2)
            if next_norm is not None and self.norm3 is None:
                return self._add(x, self.mlp(y), "pre", next_norm)
            branch = self.mlp(y)
            scale = self.drop_path(branch)
            x = x + branch if scale is None else x + branch * scale.view(-1, 1, 1, 1).to(branch.dtype)
            x = x if self.norm3 is None else self.norm3(x)
            return x, x if next_norm is None else next_norm(x)
        x, y = self._add(x, self.attn(y, bias), "post", self.norm1)
        x, y = self._add(x, self.mlp(y), "post", self.norm2)
        if self.norm3 is not None:
            x = y = self.norm3(x)
        return x, y

    def _add(self, x: Tensor, branch: Tensor, order: str, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        scale = self.drop_path(branch)
        return fk.residual_norm(
            x, branch, norm.weight, norm.bias, order=order, eps=norm.eps, drop_scale=scale, impl=self.attn.impl
        )


class PatchMerging(nn.Module):
    """2×2 tokens → one of twice the channels; Swin normalises before the reduction, SwinV2 after."""

    def __init__(self, dim: int, version: int, impl: str) -> None:
        super().__init__()
        self.version, self.impl = version, impl
        self.norm = nn.LayerNorm(4 * dim if version == 1 else 2 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.version == 1:
            x = fk.patch_merge(x, self.norm.weight, self.norm.bias, eps=self.norm.eps, impl=self.impl)
            return self.reduction(x)
        return self.norm(self.reduction(fk.patch_merge(x, impl=self.impl)))


def init_attention(attn: WindowAttention) -> None:
    if attn.logit_scale is None:
        trunc_normal_(attn.relative_position_bias_table, std=0.02, bound=2.0)
        return
    nn.init.constant_(attn.logit_scale, math.log(10))
    if attn.q_bias is not None:
        nn.init.zeros_(attn.q_bias)
        nn.init.zeros_(attn.v_bias)
