"""timm's Swin and SwinV2 modules on the kernels: window attention, block, stage, patch merging."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import swin_transformer as v1
from timm.models import swin_transformer_v2 as v2
from torch import Tensor, nn

from ..fusion import norm_adds_bias
from ..linear.op import linear, product_dtype
from ..patch_merge.op import patch_merge
from ..position_bias.op import BiasPlan, Block, plan_of, position_bias
from ..residual_norm.op import layer_norm
from ..window_attention.layout import crop_shifted, pad_shifted
from ..window_attention.op import window_attention
from . import rules
from .parts import DropIn, add_and_norm, adopt, adopt_mlp, drop_scale, mlp_branch, normed_dtype

Pair = tuple[int, int]


class PadsMaps(DropIn):
    """What pads a map that the window does not divide.

    ``policy``: "parity" shifts the map before it pads it, as timm does, so that first and last rows and columns attend
    to each other wherever the window does not divide the map; "default" pads it before.
    """

    policy = "parity"
    window_size: Pair

    def padding(self, x: Tensor) -> Pair:
        """Rows and columns that (B, H, W, C) lacks."""
        return -x.shape[1] % self.window_size[0], -x.shape[2] % self.window_size[1]


class _MapAttention(PadsMaps):
    """Window attention that takes the whole map; timm's (windows, N, C) goes to timm's own forward.

    The plan of the position bias is a function of the window and the device: no buffer, so that the state dict and
    the buffers stay timm's, and made again wherever timm makes its own index again.
    """

    _plan: tuple[BiasPlan, tuple[Block, ...]]

    def forward(self, x: Tensor, mask: Tensor | None = None, *, shift_size: Pair = (0, 0)) -> Tensor:
        """(B, H, W, C) → (B, H, W, C) with windows shifted by ``shift_size``, or what timm's forward takes.

        A map that the window does not divide is padded as timm's blocks pad it, or as ``policy`` says.

        Raises:
            ValueError: A map, where something must run that the kernels leave out: dropout in training, hooks on
                the modules inside.
        """
        if x.ndim == 3:
            return super().forward(x, mask)
        if reason := (self.training and self.dropout()) or self.rule():
            raise ValueError(f"{type(self).__name__}: {reason}; pass windows (windows, N, C), which take timm's path")
        return self._attend(x, shift_size, self.proj.bias)

    def rule(self) -> str:
        return rules.attention(self)

    def dropout(self) -> str:
        return rules.dropout(self.attn_drop, self.proj_drop)

    def branch(self, x: Tensor, shift_size: Pair) -> tuple[Tensor, Tensor | None]:
        """The result on the map, and the bias of ``proj`` where the residual norm is still to add it."""
        bias: Tensor | None = self.proj.bias
        now, later = (None, bias) if norm_adds_bias(self.impl, x.device, product_dtype(x)) else (bias, None)
        return self._attend(x, shift_size, now), later

    def set_window_size(self, window_size: Pair) -> None:
        super().set_window_size(window_size)
        self._make_plan()

    def settle(self, impl: str) -> None:
        super().settle(impl)
        self._make_plan()

    def _init_buffers(self) -> None:
        super()._init_buffers()
        self._make_plan()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)
        self._make_plan()
        return self

    def _make_plan(self) -> None:
        index: Tensor = self.relative_position_index
        rows: int = (2 * self.window_size[0] - 1) * (2 * self.window_size[1] - 1)
        heads: int = self.num_heads
        # Of a model that was built on meta, the buffers are moved here before timm fills them.
        plan, blocks = plan_of([index], [1], [heads], [rows], *self._coords())
        self._plan = BiasPlan(*(tensor.to(index.device) for tensor in plan)), blocks

    def _coords(self) -> tuple[Any, ...]:
        """Log-spaced coordinates and the width of the MLP that reads them, where the bias is continuous."""
        return ()

    def _attend(self, x: Tensor, shift_size: Pair, proj_bias: Tensor | None) -> Tensor:
        height, width = x.shape[1:3]
        pad, padded_after_shift = self.padding(x), shift_size if self.policy == "parity" else (0, 0)
        x = pad_shifted(x, pad, padded_after_shift) if any(pad) else x
        bias = position_bias(*self._plan, [self._bias_parameters()], impl=self.impl)[0]
        x = window_attention(
            linear(x, self.qkv.weight, self._qkv_bias(), impl=self.impl), bias, num_heads=self.num_heads,
            window_size=self.window_size, shift_size=shift_size, logit_scale=getattr(self, "logit_scale", None),
            impl=self.impl)
        x = crop_shifted(x, height, width, padded_after_shift) if any(pad) else x
        return linear(x, self.proj.weight, proj_bias, impl=self.impl)

    def _bias_parameters(self) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def _qkv_bias(self) -> Tensor | None:
        raise NotImplementedError


class WindowAttention(_MapAttention, v1.WindowAttention):
    """timm's ``swin_transformer.WindowAttention`` on a map; arguments are timm's, and ``impl`` of the ops."""

    def _bias_parameters(self) -> tuple[Tensor, ...]:
        return (self.relative_position_bias_table,)

    def _qkv_bias(self) -> Tensor | None:
        return self.qkv.bias


class WindowAttentionV2(_MapAttention, v2.WindowAttention):
    """timm's ``swin_transformer_v2.WindowAttention`` on a map; arguments are timm's, and ``impl`` of the ops."""

    def _coords(self) -> tuple[Any, ...]:
        return [self.relative_coords_table.reshape(-1, 2)], self.cpb_mlp[0].out_features

    def _bias_parameters(self) -> tuple[Any, ...]:
        return self.cpb_mlp[0].weight, self.cpb_mlp[0].bias, self.cpb_mlp[2].weight

    def _qkv_bias(self) -> Tensor | None:
        return None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))


_ATTENTION: dict[type[nn.Module], type[_MapAttention]] = {v1.WindowAttention: WindowAttention,
                                                         v2.WindowAttention: WindowAttentionV2}


class _Block(PadsMaps):
    def settle(self, impl: str) -> None:
        super().settle(impl)
        for theirs, ours in _ATTENTION.items():
            if type(self.attn) in (theirs, ours):
                adopt(self.attn, ours, impl)
        adopt_mlp(self, impl)

    def rule(self) -> str:
        known = (*_ATTENTION, *_ATTENTION.values())
        return rules.exact("attn", self.attn, known) or rules.attention(self.attn) or rules.residuals(self)

    def dropout(self) -> str:
        return rules.dropout(self.attn.attn_drop, self.attn.proj_drop)

    def as_timm(self) -> bool:
        return not isinstance(self.attn, _MapAttention) or super().as_timm()

    def _attn(self, x: Tensor) -> Tensor:
        """timm's own path, (B, H, W, C) → (B, H, W, C), which pads nothing where it is given whole windows."""
        height, width = x.shape[1:3]
        x = x if self.policy == "parity" else pad_shifted(x, self.padding(x), (0, 0))
        found: Tensor = super()._attn(x)
        return found[:, :height, :width]


class SwinTransformerBlock(_Block, v1.SwinTransformerBlock):
    """timm's Swin block; arguments are timm's, and ``impl`` of the ops."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) → (B, H, W, C)."""
        if self.as_timm():
            return super().forward(x)
        return self.step(*add_and_norm(self.norm1, x, None, "pre", self.impl), None)[0]

    def step(self, x: Tensor, y: Tensor, next_norm: nn.LayerNorm | None) -> tuple[Tensor, Tensor]:
        """From the stream and ``norm1`` of it to the stream and ``next_norm`` of it (without one: the stream)."""
        branch, bias = self.attn.branch(y, self.shift_size)
        x, y = add_and_norm(self.norm2, x, branch, "pre", self.impl, branch_bias=bias,
                            drop_scale=drop_scale(self.drop_path1, branch, branch.dtype))
        if next_norm is None:
            x = x + self.drop_path2(self.mlp(y))
            return x, x
        branch, bias = mlp_branch(self.mlp, y)
        return add_and_norm(next_norm, x, branch, "pre", self.impl, branch_bias=bias,
                            drop_scale=drop_scale(self.drop_path2, branch, branch.dtype))


class SwinTransformerV2Block(_Block, v2.SwinTransformerV2Block):
    """timm's SwinV2 block; arguments are timm's, and ``impl`` of the ops."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) → (B, H, W, C)."""
        if self.as_timm():
            return super().forward(x)
        x = x.to(normed_dtype(x))
        return self.step(x, x, True)[0]

    def step(self, x: Tensor, y: Tensor, last: bool) -> tuple[Tensor, Tensor]:
        """The stream for its two readers, the addition and the product: the latter's in autocast's dtype.

        ``last``: no block reads the second result.
        """
        branch, bias = self.attn.branch(y, self.shift_size)
        x, y = add_and_norm(self.norm1, x, branch, "post", self.impl, branch_bias=bias,
                            drop_scale=drop_scale(self.drop_path1, branch, x.dtype))
        branch, bias = mlp_branch(self.mlp, y)
        return add_and_norm(self.norm2, x, branch, "post", self.impl, branch_bias=bias,
                            out_dtype=x.dtype if last else None,
                            drop_scale=drop_scale(self.drop_path2, branch, x.dtype))


class _Stage(DropIn):
    """Blocks that hand on the stream and what the next one reads of it, which one pass writes."""

    def rule(self) -> str:
        """None of its own; what forbids a block its step forbids it here."""
        return ""

    def as_timm(self) -> bool:
        """Block by block, as checkpointing, a hook on a block, or a block that is no drop-in asks for."""
        return bool(self.grad_checkpointing) or any(
            not isinstance(block, _Block) or rules.hooked(block) or block.as_timm() for block in self.blocks)


class SwinTransformerStage(_Stage, v1.SwinTransformerStage):
    """timm's Swin stage; the pass that adds to the stream also applies the next block's first norm."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) → (B, H', W', D)."""
        if self.as_timm():
            return super().forward(x)
        x = self.downsample(x)
        norms = [block.norm1 for block in self.blocks]
        x, y = add_and_norm(norms[0], x, None, "pre", self.impl)
        for block, next_norm in zip(self.blocks, [*norms[1:], None], strict=True):
            x, y = block.step(x, y, next_norm)
        return x


class SwinTransformerV2Stage(_Stage, v2.SwinTransformerV2Stage):
    """timm's SwinV2 stage; the pass that adds to the stream also casts it for the next block's product."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) → (B, H', W', D)."""
        if self.as_timm():
            return super().forward(x)
        x = self.downsample(x)
        x = y = x.to(normed_dtype(x))
        for i, block in enumerate(self.blocks):
            x, y = block.step(x, y, i == len(self.blocks) - 1)
        return x


class PatchMerging(DropIn, v1.PatchMerging):
    """timm's ``swin_transformer.PatchMerging``: gather, norm, reduction."""

    def rule(self) -> str:
        return rules.merging(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, D)."""
        if self.as_timm():
            return super().forward(x)
        merged = patch_merge(x, self.norm.weight, self.norm.bias, eps=self.norm.eps, impl=self.impl)
        return linear(merged, self.reduction.weight, self.reduction.bias, impl=self.impl)


class PatchMergingV2(DropIn, v2.PatchMerging):
    """timm's ``swin_transformer_v2.PatchMerging``: gather, reduction, norm."""

    def rule(self) -> str:
        return rules.merging(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, D)."""
        if self.as_timm():
            return super().forward(x)
        x = linear(patch_merge(x, impl=self.impl), self.reduction.weight, self.reduction.bias, impl=self.impl)
        norm: nn.LayerNorm = self.norm
        return layer_norm(x, norm.weight, norm.bias, eps=norm.eps, out_dtype=normed_dtype(x), impl=self.impl)
