"""Shifted-window attention of Swin and SwinV2, from the fused qkv projection to the merged heads.

Swin: Liu et al. 2021, section 3.2. SwinV2 (cosine similarity, clamped logit scale): Liu et al. 2022,
section 3.2–3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..common.arguments import explained, floating, shown, whole, wrong
from ..common.define_op import Kept, define_op
from ..common.rows import cast, statistics_dtype
from . import on_torch
from .layout import pair


@explained()
def window_attention(qkv: Tensor, bias: Tensor, *, num_heads: int, window_size: int | tuple[int, int],
                     shift_size: int | tuple[int, int] = (0, 0), logit_scale: Tensor | None = None,
                     impl: str = "auto") -> Tensor:
    """Self-attention within (cyclically shifted) windows, reading and writing the image layout.

    Args:
        qkv: (B, H, W, 3C), channels ordered (q|k|v, head, head_dim); the window divides H and W. Autocast casts it.
        bias: (num_heads, N, N) added to the logits, N = window area.
        num_heads: Number of heads; divides C.
        window_size: (rows, columns) of a window in tokens, or one number for both.
        shift_size: (rows, columns) of the cyclic shift, or one number for both; pairs that only the
            shift brought together get −100.
        logit_scale: None for softmax(q·k/√d); else num_heads values λ in any shape, for SwinV2's
            cos(q, k)·exp(min(λ, ln 100)).
        impl: See :mod:`fastmim_kernels.common.dispatch`.

    Returns:
        (B, H, W, C) in the dtype of ``qkv``. Logits and softmax are in float32 whatever that is.

    Raises:
        ValueError: An argument is not what is said here.
    """
    num_heads, window, shift = whole(num_heads), _both(window_size), _both(shift_size)
    check(qkv, bias, num_heads, window, shift, logit_scale)
    device = qkv.device.type
    if torch.is_autocast_enabled(device) and qkv.dtype != torch.float64:
        qkv = cast(qkv, torch.get_autocast_dtype(device))
    return OP(qkv, bias, logit_scale, num_heads, window, shift, impl=impl)


def traffic(shape: Sequence[int], num_heads: int, window_size: tuple[int, int], *, itemsize: int = 2
            ) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Least (bytes read, bytes written, FLOPs) of forward and of backward.

    Forward reads qkv and a float32 bias once and writes the output and a float32 log-sum-exp of each row and head.
    Backward reads those, the output's gradient and the bias, and writes two gradients; five products, not two. Not
    counted, since they stay in a GPU's L1 or L2: beyond 64 tokens the bias read again for every window, and in backward
    the bias with its masks, the bias gradient of each group of windows, written and read once, and a second read of
    what a window holds.

    Args:
        shape: (B, H, W, 3C) of qkv.
        num_heads, window_size: As given to the op.
        itemsize: Bytes of a value of qkv.
    """
    batch, height, width, c3 = shape
    n, tokens = window_size[0] * window_size[1], batch * height * width
    row, lse, bias = tokens * c3 // 3 * itemsize, tokens * num_heads * 4, num_heads * n * n * 4
    product = 2 * tokens * n * c3 // 3
    return (3 * row + bias, row + lse, 2 * product), (5 * row + lse + bias, 3 * row + bias, 5 * product)


def _both(size: int | tuple[int, int]) -> tuple[int, int]:
    """Of rows and of columns; whether it can be that, :func:`check` asks."""
    if type(size) is tuple and len(size) == 2 and type(size[0]) is type(size[1]) is int:  # as models have it
        return size
    size = whole(size)
    return (size, size) if isinstance(size, int) else tuple(map(whole, size))


def check(qkv: Tensor, bias: Tensor, num_heads: int, window_size: tuple[int, int], shift_size: tuple[int, int],
          logit_scale: Tensor | None) -> None:
    """Raise ``ValueError`` where shapes do not belong together."""
    op = "window_attention"
    floating(op, qkv, bias, logit_scale)
    if num_heads < 1:
        raise wrong(op, "num_heads", "1 or more", num_heads)
    if len(window_size) != 2 or min(window_size) < 1:
        raise wrong(op, "window_size", "one or two numbers of 1 or more", window_size)
    if len(shift_size) != 2 or not (0 <= shift_size[0] < window_size[0] and 0 <= shift_size[1] < window_size[1]):
        raise ValueError(f"{op}: shift_size={shown(shift_size)} must lie within the window {shown(window_size)}")
    shape = qkv.shape
    if len(shape) != 4 or not shape[3] or shape[3] % (3 * num_heads):
        raise wrong(op, "qkv", f"(B, H, W, 3C) with C divisible by num_heads={num_heads}", qkv)
    if shape[1] % window_size[0] or shape[2] % window_size[1]:
        raise ValueError(f"{op}: window_size={shown(window_size)} must divide the {shape[1]}x{shape[2]} map of qkv, "
                         f"got {shown(qkv)}")
    n = window_size[0] * window_size[1]
    if bias.shape != (num_heads, n, n):
        raise wrong(op, "bias", f"{(num_heads, n, n)}, num_heads and twice the window's area", bias)
    if logit_scale is not None and logit_scale.numel() != num_heads:
        raise wrong(op, "logit_scale", f"num_heads={num_heads} values", logit_scale)


def _fake(qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, num_heads: int, window_size: Sequence[int],
          shift_size: Sequence[int], impl: str) -> tuple[Tensor, Tensor]:
    """The output, and Triton's log-sum-exp (B·windows, heads, N) of each row or torch's kept weights, if any."""
    batch, height, width, c3 = qkv.shape
    n = window_size[0] * window_size[1]
    if impl == "triton":
        lse = qkv.new_empty((batch * height * width // n, num_heads, n), dtype=torch.float32)
    else:
        lse = on_torch.kept_weights(qkv, num_heads, pair(window_size))
    return qkv.new_empty(batch, height, width, c3 // 3), lse


def _backward_fake(grad_out: Tensor, qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, out: Tensor | None,
                   lse: Tensor, num_heads: int, window_size: Sequence[int], shift_size: Sequence[int], impl: str
                   ) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, bias and logit_scale, the last two in float32 or better; the last empty without one."""
    wide = statistics_dtype(qkv.dtype)
    return qkv.new_empty(qkv.shape), bias.new_empty(bias.shape, dtype=wide), \
        bias.new_empty((0,) if logit_scale is None else logit_scale.shape, dtype=wide)


def _save(inputs: Any, outputs: Any) -> Any:
    qkv, bias, logit_scale, *settings = inputs
    out, lse = outputs
    # The torch backward needs no output; the Triton one does, and the projection that reads it saves it anyway.
    return (qkv, bias, logit_scale, out if settings[-1] == "triton" else None, lse), tuple(settings)


def _gradients(backward: Callable, kept: Kept, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    _, bias, logit_scale, *_ = kept.tensors
    dqkv, dbias, dscale = backward(grad_out, *kept.tensors, *kept.settings)
    return dqkv, cast(dbias, bias.dtype), None if logit_scale is None else cast(dscale, logit_scale.dtype)


def _flops(qkv: Any, bias: Any, logit_scale: Any, num_heads: int, window_size: Any, *_: Any) -> int:
    return traffic(qkv, num_heads, window_size)[0][2]


def _backward_flops(grad: Any, qkv: Any, bias: Any, logit_scale: Any, out: Any, lse: Any, num_heads: int,
                    window_size: Any, *_: Any) -> int:
    flops = traffic(qkv, num_heads, window_size)[1][2]
    # With its weights kept (heads, windows, B, N, N) it has four products.
    return flops // 5 * 4 if len(lse) == 5 else flops


OP = define_op("window_attention", on_torch, ".triton_forward", reference=reference.window_attention, fake=_fake,
               backward_fake=_backward_fake, save=_save, gradients=_gradients, flops=_flops,
               backward_flops=_backward_flops)
