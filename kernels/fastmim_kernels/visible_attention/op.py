"""Window attention among the tokens that are there: of a masked image only the visible ones, stored without gaps.

The idea is that of Huang et al. 2022 ("Green Hierarchical Vision Transformer for Masked Image Modeling", section 3.2):
windows hold unequal numbers of visible tokens, which are brought together so that little is computed for the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..common.arguments import explained, floating, whole, within, wrong
from ..common.define_op import Kept, define_op
from ..common.rows import cast, statistics_dtype
from . import on_torch


@explained(slots="index", places="index", groups="index")
def visible_attention(qkv: Tensor, bias: Tensor, slots: Tensor, places: Tensor, *, num_heads: int,
                      groups: Tensor | None = None, padding: Tensor | None = None,
                      logit_scale: Tensor | None = None, impl: str = "auto") -> Tensor:
    """Self-attention within the windows of an image of which only some tokens are given.

    Args:
        qkv: (B, …, 3C), T tokens of each image in any order, channels (q|k|v, head, head_dim). Autocast casts it.
        bias: (num_heads, N, N) added to the logits of a window's positions.
        slots: (B, W, N) int64: which of the image's T tokens stand in each window, each in one; −2 is a position where
            the map is padded. Behind them −1, for positions where nothing stands. Numbers beyond these, and beyond
            those of ``places``, are refused on a CPU; a GPU does not look.
        places: (B, W, N) int64: the position of each of these in the window; all N, each once.
        num_heads: Number of heads; divides C.
        groups: (W, N) int64; pairs of different groups, which only the shift brought together, get −100.
        padding: (3C,) what the projection makes of a padded position, which is a key to the others; None where
            ``slots`` has none.
        logit_scale: As of :func:`.window_attention.op.window_attention`.
        impl: See :mod:`fastmim_kernels.common.dispatch`. "triton" runs those of window attention, on windows
            filled up with what is not there.

    Returns:
        (B, …, C) in the dtype of ``qkv``. Logits and softmax are in float32 whatever that is.

    Raises:
        ValueError: An argument is not what is said here.
    """
    num_heads = whole(num_heads)
    _check(qkv, bias, slots, places, num_heads, groups, padding, logit_scale)
    device = qkv.device.type
    if torch.is_autocast_enabled(device) and qkv.dtype != torch.float64:
        qkv = cast(qkv, torch.get_autocast_dtype(device))
    padding = None if padding is None else cast(padding, qkv.dtype)
    out: Tensor = OP(qkv.flatten(1, -2), bias, logit_scale, padding, slots, places, groups, num_heads, impl=impl)
    return out.view(*qkv.shape[:-1], out.shape[-1])


def traffic(qkv: Sequence[int], slots: Sequence[int], num_heads: int, *, itemsize: int = 2
            ) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Least (bytes read, bytes written, FLOPs) of forward and of backward: as of window attention, and two tables.

    Args:
        qkv, slots: Shapes (B, T, 3C) and (B, W, N).
        num_heads: As given to the op.
        itemsize: Bytes of a value of qkv.
    """
    row, bias = math.prod(qkv) // 3 * itemsize, 4 * num_heads * slots[2] ** 2
    tables, product = 16 * math.prod(slots), _products(qkv, slots)
    return (3 * row + bias + tables, row, 2 * product), (4 * row + bias + tables, 3 * row + bias, 5 * product)


def _check(qkv: Tensor, bias: Tensor, slots: Tensor, places: Tensor, num_heads: int, groups: Tensor | None,
           padding: Tensor | None, logit_scale: Tensor | None) -> None:
    op = "visible_attention"
    floating(op, qkv, bias, padding, logit_scale)
    if num_heads < 1:
        raise wrong(op, "num_heads", "1 or more", num_heads)
    if qkv.ndim < 3 or not qkv.shape[-1] or qkv.shape[-1] % (3 * num_heads):
        raise wrong(op, "qkv", f"(B, …, 3C) with C divisible by num_heads={num_heads}", qkv)
    if slots.ndim != 3 or slots.shape[0] != qkv.shape[0] or slots.dtype != torch.int64:
        raise wrong(op, "slots", f"({qkv.shape[0]}, W, N) of int64 for qkv of {tuple(qkv.shape)}", slots)
    if places.shape != slots.shape or places.dtype != torch.int64:
        raise wrong(op, "places", f"{tuple(slots.shape)} of int64, as slots", places)
    n = slots.shape[2]
    if bias.shape != (num_heads, n, n):
        raise wrong(op, "bias", f"{(num_heads, n, n)}, num_heads and twice the window's area", bias)
    if groups is not None and (groups.shape != slots.shape[1:] or groups.dtype != torch.int64):
        raise wrong(op, "groups", f"{tuple(slots.shape[1:])} of int64", groups)
    if padding is not None and padding.shape != qkv.shape[-1:]:
        raise wrong(op, "padding", f"{tuple(qkv.shape[-1:])} for qkv of {tuple(qkv.shape)}", padding)
    if logit_scale is not None and logit_scale.numel() != num_heads:
        raise wrong(op, "logit_scale", f"num_heads={num_heads} values", logit_scale)
    tokens, least = math.prod(qkv.shape[1:-1]), -1 if padding is None else -2
    within(op, "slots", slots, least, tokens - 1,
           "tokens of qkv or -1" if padding is None else "tokens of qkv, -1 or, with padding, -2")
    within(op, "places", places, 0, n - 1, "positions in a window")


def _fake(qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, padding: Tensor | None, slots: Tensor,
          places: Tensor, groups: Tensor | None, num_heads: int, impl: str) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp (B·W, heads, N) of each place where the implementation keeps it."""
    lse = (slots.shape[0] * slots.shape[1], num_heads, slots.shape[2]) if impl == "triton" else (0,)
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3), qkv.new_empty(lse, dtype=torch.float32)


def _backward_fake(grad: Tensor, qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, padding: Tensor | None,
                   slots: Tensor, places: Tensor, groups: Tensor | None, out: Tensor | None, lse: Tensor,
                   num_heads: int, impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, bias, logit_scale and padding, all but the first in float32 or better; empty without one."""
    wide = statistics_dtype(qkv.dtype)
    return (qkv.new_empty(qkv.shape), bias.new_empty(bias.shape, dtype=wide),
            bias.new_empty((0,) if logit_scale is None else logit_scale.shape, dtype=wide),
            bias.new_empty((0,) if padding is None else padding.shape, dtype=wide))


def _save(inputs: Any, outputs: Any) -> Any:
    *tensors, num_heads, impl = inputs
    out, lse = outputs
    # The projection behind it keeps the output anyway.
    return (*tensors, out if impl == "triton" else None, lse), (num_heads, impl)


def _gradients(backward: Callable, kept: Kept, grad: Tensor) -> tuple[Tensor | None, ...]:
    _, bias, logit_scale, padding, *_ = kept.tensors
    dqkv, dbias, *rest = backward(grad, *kept.tensors, *kept.settings)
    return dqkv, cast(dbias, bias.dtype), *(None if t is None else cast(d, t.dtype)
                                            for t, d in zip((logit_scale, padding), rest, strict=True))


def _products(qkv: Sequence[int], slots: Sequence[int]) -> int:
    """FLOPs of one product of W windows of as many tokens as any of them can hold."""
    batch, tokens, c3 = qkv
    _, windows, n = slots
    return 2 * batch * windows * min(n, tokens) ** 2 * c3 // 3


def _flops(qkv: Any, bias: Any, logit_scale: Any, padding: Any, slots: Any, *_: Any) -> int:
    return traffic(qkv, slots, 1)[0][2]


def _backward_flops(grad: Any, qkv: Any, bias: Any, logit_scale: Any, padding: Any, slots: Any, *_: Any) -> int:
    return traffic(qkv, slots, 1)[1][2]


OP = define_op("visible_attention", on_torch, ".on_triton", reference=reference.visible_attention, fake=_fake,
               backward_fake=_backward_fake, save=_save, gradients=_gradients, flops=_flops,
               backward_flops=_backward_flops)
