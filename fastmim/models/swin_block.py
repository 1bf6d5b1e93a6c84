"""The pieces of a Swin or SwinV2 stage: window attention, the block around it, patch merging."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmim_kernels as fk
from fastmim_kernels.common.dispatch import picks_triton

from .layers import Mlp, trunc_normal_
from .read_rows import take, take_stream
from .swin_shared import Shared

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

    def forward(
        self,
        x: Tensor,
        shared: Shared,
        *,
        last_bias: bool = True,
        hand_on: bool = False,
        rows: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, H, W, C) → (B, H, W, C), or (rows, C) of those tokens alone.

        Without ``last_bias`` the caller adds that of ``proj``; ``hand_on`` returns x beside the result.
        """
        stream = x
        height, width = x.shape[1:3]
        pad = (-height % self.window_size[0], -width % self.window_size[1])
        if any(pad):
            x = self._pad(x, pad)
        tensors = x, self.qkv.weight, shared.qkv_bias
        low = {"low_weight": shared.low_qkv, "low_bias": shared.low_qkv_bias}
        if hand_on and not any(pad):
            qkv, stream = fk.linear_and_input(*tensors, **low, impl=self.impl)
        else:
            qkv = fk.linear(*tensors, **low, impl=self.impl)
        x = fk.window_attention(
            qkv,
            shared.bias,
            num_heads=self.num_heads,
            window_size=self.window_size,
            shift_size=self.shift_size,
            logit_scale=self.logit_scale,
            impl=self.impl,
        )
        if any(pad):
            x = self._unpad(x, height, width)
        x = x if rows is None else take(x, rows)
        bias = self.proj.bias if last_bias else None
        out = fk.linear(x, self.proj.weight, bias, low_weight=shared.low_proj, impl=self.impl)
        return (out, stream) if hand_on else out

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
        version: int,
        extra_norm: bool,
    ) -> None:
        super().__init__()
        self.version = version
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), attn.impl)
        self.norm3 = nn.LayerNorm(dim) if extra_norm else None

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        shared: Shared,
        next_norm: nn.LayerNorm | None,
        merge: bool = False,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One block on the residual stream.

        Args:
            x: (B, H, W, C) residual stream.
            y: What attention reads: ``norm1(x)`` for Swin, x itself for SwinV2, in the dtype of the products.
            shared: This block's.
            merge: SwinV2: gather 2×2 tokens, for the next stage.
            next_norm: Swin: the norm that reads this block's result, applied in the pass that adds to the stream.
            rows: Numbers of the only tokens whose results are read; these come as (rows, C).

        Returns:
            The stream, and ``next_norm`` of it (without one, or for SwinV2, the stream again).
        """
        # The gradient of a bias is nearly free in the pass of the norm; on a CPU the product adds the bias for less.
        inside = not picks_triton("residual_norm", self.attn.impl, x.device)
        # Where the product reads the stream itself, its backward pass adds the gradients of the two readers.
        hand_on = self.version == 2 and not inside and x.dtype == y.dtype and rows is None
        branch = self.attn(y, shared, last_bias=inside, hand_on=hand_on, rows=rows)
        x, (attn_drop, mlp_drop) = (x, shared.drop) if rows is None else take_stream(x, shared.drop, rows)
        bias = None if inside else self.attn.proj.bias
        if self.version == 2:
            branch, x = branch if hand_on else (branch, x)
            x, y = self._add(x, branch, self.norm1, bias, attn_drop)
            last = self.norm3 is None
            branch = self._mlp(y, shared, inside, hand_on)
            branch, x = branch if hand_on else (branch, x)
            x, y = self._add(x, branch, self.norm2, self._mlp_bias(inside), mlp_drop, merge and last)
            return (x, y) if last else start_stream(x, self.norm3, x.dtype, self.attn.impl, merge)
        x, y = self._add(x, branch, self.norm2, bias, attn_drop)
        if next_norm is not None and self.norm3 is None:
            return self._add(x, self._mlp(y, shared, inside), next_norm, self._mlp_bias(inside), mlp_drop)
        branch = self._mlp(y, shared, True)
        x = x + (branch if mlp_drop is None else branch * mlp_drop.view(-1, *[1] * (x.ndim - 1)).to(branch.dtype))
        x = x if self.norm3 is None else start_stream(x, self.norm3, x.dtype, self.attn.impl)[0]
        return (x, x) if next_norm is None else normalise(x, next_norm, self.attn.impl)

    def weights(self) -> list[Tensor]:
        """Those of the four products, in the order of the copies in :class:`Shared`."""
        return [self.attn.qkv.weight, self.attn.proj.weight, self.mlp.fc1.weight, self.mlp.fc2.weight]

    def _mlp(self, x: Tensor, shared: Shared, last_bias: bool, hand_on: bool = False) -> Any:
        return self.mlp(x, last_bias=last_bias, low_weights=(shared.low_fc1, shared.low_fc2), hand_on=hand_on)

    def _mlp_bias(self, inside: bool) -> Tensor | None:
        return None if inside else self.mlp.fc2.bias

    def _add(
        self,
        x: Tensor,
        branch: Tensor,
        norm: nn.LayerNorm,
        bias: Tensor | None,
        drop: Tensor | None,
        merge: bool = False,
    ) -> tuple[Tensor, Tensor]:
        return fk.residual_norm(
            x,
            branch,
            norm.weight,
            norm.bias,
            order="pre" if self.version == 1 else "post",
            eps=norm.eps,
            drop_scale=drop,
            branch_bias=bias,
            merge=merge,
            impl=self.attn.impl,
        )


class PatchMerging(nn.Module):
    """2×2 tokens → one of twice the channels; Swin normalises before the reduction, SwinV2 after."""

    def __init__(self, dim: int, version: int, impl: str) -> None:
        super().__init__()
        self.version, self.impl = version, impl
        self.norm = nn.LayerNorm(4 * dim if version == 1 else 2 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor, dtype: torch.dtype, low_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, H, W, C) → the (B, ⌈H/2⌉, ⌈W/2⌉, 2C) stream in ``dtype`` for its two readers, see ``residual_norm``.

        SwinV2's map may have been gathered to (B, H/2, W/2, 4C) already, where the last block wrote it.
        """
        norm, weight = self.norm, self.reduction.weight
        if self.version == 2:
            x = x if x.shape[-1] == weight.shape[1] else fk.patch_merge(x, impl=self.impl)
            reduced = fk.linear(x, weight, low_weight=low_weight, impl=self.impl)
            return start_stream(reduced, norm, dtype, self.impl)
        merged = fk.patch_merge(x, norm.weight, norm.bias, eps=norm.eps, impl=self.impl)
        reduced = fk.linear(merged, weight, low_weight=low_weight, impl=self.impl).to(dtype)
        return reduced, reduced


def start_stream(
    x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype, impl: str, merge: bool = False
) -> tuple[Tensor, Tensor]:
    """``norm(x)`` as a residual stream in ``dtype`` and for the next product."""
    return fk.residual_norm(
        None, x, norm.weight, norm.bias, order="post", eps=norm.eps, stream_dtype=dtype, merge=merge, impl=impl
    )


def normalise(x: Tensor, norm: nn.LayerNorm, impl: str) -> tuple[Tensor, Tensor]:
    """The stream x, and ``norm(x)`` for the next product."""
    return fk.residual_norm(x, None, norm.weight, norm.bias, order="pre", eps=norm.eps, impl=impl)


def init_attention(attn: WindowAttention) -> None:
    if attn.logit_scale is None:
        trunc_normal_(attn.relative_position_bias_table, std=0.02, bound=2.0)
        return
    nn.init.constant_(attn.logit_scale, math.log(10))
    if attn.q_bias is not None:
        nn.init.zeros_(attn.q_bias)
        nn.init.zeros_(attn.v_bias)
