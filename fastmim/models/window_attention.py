"""Self-attention within windows, as Swin's blocks have it and those of SwinV2 extend it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fastmim_kernels as fk
from fastmim_kernels.branches import Attention, Branch, attention
from fastmim_kernels.window_attention.layout import crop_shifted, pad_shifted

from .layers import trunc_normal_
from .stream import Step, weight_and_bias

Pair = tuple[int, int]


class WindowAttention(nn.Module):
    """Attention with a table of position biases; a step evaluates those of all blocks at once, see :class:`.Step`.

    A map that the window does not divide gets rows and columns of zeros at its end, which are keys to the windows there
    (their projection is the bias). The map is then shifted, and the mask separates what the shift brought together.

    Args:
        parity: Shift before the zeros are added, as timm does: first and last rows and columns attend to each other.
    """

    logit_scale: Tensor | None

    def __init__(
        self, dim: int, num_heads: int, window_size: Pair, shift_size: Pair, qkv_bias: bool, parity: bool
    ) -> None:
        super().__init__()
        self.num_heads, self.window_size, self.shift_size = num_heads, window_size, shift_size
        self.padded_after_shift = shift_size if parity else (0, 0)
        self.add_parameters(dim, qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def add_parameters(self, dim: int, qkv_bias: bool) -> None:
        """All but the projection's."""
        self.logit_scale = None
        entries = (2 * self.window_size[0] - 1) * (2 * self.window_size[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty(entries, self.num_heads))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)

    def reset_parameters(self) -> None:
        """All but those of linear layers."""
        trunc_normal_(self.relative_position_bias_table, std=0.02, bound=2.0)

    def bias_parameters(self) -> tuple[Tensor, ...]:
        """What :func:`fastmim_kernels.position_bias` makes the position bias from."""
        return (self.relative_position_bias_table,)

    def forward(self, y: Tensor, *, step: Step, stream: Tensor | None = None) -> Any:
        """(B, H, W, C) → (B, H, W, C), or the rows that ``step`` wants, without the bias of ``proj`` where it says so.

        (result, y), where the product adds the gradient of the other reader of ``stream``, which y is too.
        """
        height, width = y.shape[1:3]
        weights = self.qkv.weight, self.qkv_bias(step)
        how = {"low_weight": step.low_qkv, "low_bias": step.low_qkv_bias, "impl": step.impl}
        hand_on = step.hands_on(y, stream)
        pad = (0, 0) if step.windows is not None else self.padding(y)
        if hand_on and not any(pad):
            qkv, y = fk.linear_and_input(y, *weights, **how)
        else:
            qkv = fk.linear(pad_shifted(y, pad, self.padded_after_shift) if any(pad) else y, *weights, **how)
        out = self.attend(qkv, step)
        out = step.take(crop_shifted(out, height, width, self.padded_after_shift) if any(pad) else out)
        out = fk.linear(out, self.proj.weight, step.product_bias(self.proj), low_weight=step.low_proj, impl=step.impl)
        return (out, y) if hand_on else out

    def attend(self, qkv: Tensor, step: Step) -> Tensor:
        """(B, H, W, 3C) → (B, H, W, C): the heads' results side by side."""
        how: Any = {"num_heads": self.num_heads, "logit_scale": self.logit_scale, "impl": step.impl}
        if step.windows is None:
            shape = {"window_size": self.window_size, "shift_size": self.shift_size}
            return fk.window_attention(qkv, step.bias, **shape, **how)
        slots, places, groups, padded = step.windows
        padding = self.qkv_bias(step) if padded else None
        if padded and padding is None:
            padding = qkv.new_zeros(qkv.shape[-1])
        return fk.visible_attention(qkv, step.bias, slots, places, groups=groups, padding=padding, **how)

    def branch(self, y: Tensor, step: Step) -> Branch | None:
        """What :meth:`forward` makes of y, to be run with the norm behind it; None where more than ops must run."""
        if step.rows is not None or step.windows is not None or any(self.padding(y)):
            return None
        weight, bias = weight_and_bias(self._modules["qkv"])
        qkv = weight, step.qkv_bias if bias is None else bias, step.low_qkv, step.low_qkv_bias
        weight, bias = weight_and_bias(self._modules["proj"])
        proj = weight, None if step.fusion.norm_adds_bias else bias, step.low_proj
        tensors = Attention(*qkv, *proj, step.bias, self.logit_scale)
        return attention(tensors, self.num_heads, self.window_size, self.shift_size)

    def qkv_bias(self, step: Step) -> Tensor | None:
        """The projection's own, or what a step has made of SwinV2's. ZeRO-3 gathers the first where it is read."""
        return step.qkv_bias if self.qkv.bias is None else self.qkv.bias

    def padding(self, x: Tensor) -> Pair:
        """Rows and columns that (B, H, W, C) lacks for whole windows."""
        return -x.shape[1] % self.window_size[0], -x.shape[2] % self.window_size[1]
