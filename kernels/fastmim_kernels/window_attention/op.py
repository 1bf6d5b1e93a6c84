"""Shifted-window attention of Swin and SwinV2, from the fused qkv projection to the merged heads.

Swin: Liu et al. 2021, section 3.2. SwinV2 (cosine similarity, clamped logit scale): Liu et al. 2022,
section 3.2–3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from ..common.define_op import outside_autocast, shortcut, shortcut_with_grad
from ..common.dispatch import resolve
from ..common.rows import statistics_dtype
from . import on_torch as plain


def window_attention(qkv: Tensor, bias: Tensor, *, num_heads: int, window_size: tuple[int, int],
                     shift_size: tuple[int, int] = (0, 0), logit_scale: Tensor | None = None,
                     impl: str = "auto") -> Tensor:
    """Self-attention within (cyclically shifted) windows, reading and writing the image layout.

    Args:
        qkv: (B, H, W, 3C), channels ordered (q|k|v, head, head_dim); the window divides H and W. Autocast casts it.
        bias: (num_heads, N, N) added to the logits, N = window area.
        num_heads: Number of heads; divides C.
        window_size: (rows, columns) of a window in tokens.
        shift_size: (rows, columns) of the cyclic shift; pairs that only the shift brought together get −100.
        logit_scale: None for softmax(q·k/√d); else num_heads values λ in any shape, for SwinV2's
            cos(q, k)·exp(min(λ, ln 100)).
        impl: See :mod:`fastmim_kernels.common.dispatch`.

    Returns:
        (B, H, W, C) in the dtype of ``qkv``. Logits and softmax are in float32 whatever that is.

    Raises:
        ValueError: Shapes do not belong together.
    """
    _check(qkv, bias, num_heads, window_size, shift_size, logit_scale)
    function = resolve("window_attention", impl, _IMPLEMENTATIONS, qkv.device)
    device = qkv.device.type
    if torch.is_autocast_enabled(device) and qkv.dtype != torch.float64:
        qkv = qkv.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return function(qkv, bias, logit_scale, num_heads, tuple(window_size), tuple(shift_size))


def traffic(shape: Sequence[int], num_heads: int, window_size: tuple[int, int], *, itemsize: int = 2
            ) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Least (bytes read, bytes written, FLOPs) of forward and of backward.

    Forward reads qkv and a float32 bias once and writes the output and a float32 log-sum-exp of each row and head.
    Backward reads those, the output's gradient and the bias, and writes two gradients; five products, not two.

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


def _check(qkv: Tensor, bias: Tensor, num_heads: int, window_size: tuple[int, int], shift_size: tuple[int, int],
           logit_scale: Tensor | None) -> None:
    n = window_size[0] * window_size[1]
    if qkv.ndim != 4 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(f"window_attention: qkv must be (B, H, W, 3C) with C divisible by num_heads={num_heads}, "
                         f"got {tuple(qkv.shape)}")
    if qkv.shape[1] % window_size[0] or qkv.shape[2] % window_size[1]:
        raise ValueError(f"window_attention: window_size={window_size} must divide the "
                         f"{qkv.shape[1]}x{qkv.shape[2]} map")
    if bias.shape != (num_heads, n, n):
        raise ValueError(f"window_attention: bias must have shape {(num_heads, n, n)}, got {tuple(bias.shape)}")
    if not all(0 <= s < w for s, w in zip(shift_size, window_size, strict=True)):
        raise ValueError(f"window_attention: shift_size={shift_size} must lie within the window {window_size}")
    if logit_scale is not None and logit_scale.numel() != num_heads:
        raise ValueError(f"window_attention: logit_scale must hold {num_heads} values, got {tuple(logit_scale.shape)}")


def _forward(qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, num_heads: int, window_size: Sequence[int],
             shift_size: Sequence[int], impl: str) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp (B·windows, heads, N) of each row where the implementation keeps it."""
    forward, _ = _functions(impl)
    return forward(qkv.contiguous(), bias, logit_scale, num_heads, tuple(window_size), tuple(shift_size))


_op = torch.library.custom_op("fastmim::window_attention", _forward, mutates_args=())


@_op.register_fake
def _(qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, num_heads: int, window_size: Sequence[int],
      shift_size: Sequence[int], impl: str) -> tuple[Tensor, Tensor]:
    batch, height, width, c3 = qkv.shape
    n = window_size[0] * window_size[1]
    lse = (batch * height * width // n, num_heads, n) if impl == "triton" else (0,)
    return qkv.new_empty(batch, height, width, c3 // 3), qkv.new_empty(lse, dtype=torch.float32)


def _backward(grad_out: Tensor, qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, out: Tensor | None,
              lse: Tensor, num_heads: int, window_size: Sequence[int], shift_size: Sequence[int], impl: str
              ) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, bias and logit_scale, the last two in float32 or better; the last empty without one."""
    _, backward = _functions(impl)
    dqkv, dbias, dscale = backward(grad_out.contiguous(), qkv.contiguous(), bias, logit_scale, out, lse, num_heads,
                                   tuple(window_size), tuple(shift_size))
    return dqkv, dbias, dbias.new_empty(0) if dscale is None else dscale


_backward_op = torch.library.custom_op("fastmim::window_attention_backward", _backward, mutates_args=())


@_backward_op.register_fake
def _(grad_out: Tensor, qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, out: Tensor | None, lse: Tensor,
      num_heads: int, window_size: Sequence[int], shift_size: Sequence[int], impl: str
      ) -> tuple[Tensor, Tensor, Tensor]:
    wide = statistics_dtype(qkv.dtype)
    return qkv.new_empty(qkv.shape), bias.new_empty(bias.shape, dtype=wide), \
        bias.new_empty((0,) if logit_scale is None else logit_scale.shape, dtype=wide)


def _functions(impl: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if impl == "triton":
        from . import triton_forward as kernels
        return kernels.forward, kernels.backward
    return plain.forward, plain.backward


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    qkv, bias, logit_scale, ctx.num_heads, ctx.window_size, ctx.shift_size, ctx.impl = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # else a launch fills zeros for lse, which has no gradient
    # The torch backward needs no output; the Triton one does, and the projection that reads it saves it anyway.
    ctx.save_for_backward(qkv, bias, logit_scale, out if ctx.impl == "triton" else None, lse)


@outside_autocast
def _autograd(ctx, grad_out, _lse):  # type: ignore[no-untyped-def]
    qkv, bias, logit_scale, out, lse = ctx.saved_tensors
    dqkv, dbias, dscale = _run_backward(grad_out, qkv, bias, logit_scale, out, lse, ctx.num_heads, ctx.window_size,
                                        ctx.shift_size, ctx.impl)
    return dqkv, dbias.to(bias.dtype), None if logit_scale is None else dscale.to(logit_scale.dtype), None, None, \
        None, None


torch.library.register_autograd("fastmim::window_attention", _autograd, setup_context=_setup_context)
_run_op = shortcut_with_grad(_op, _forward, _setup_context, _autograd)
_run_backward = shortcut(_backward_op, _backward)


@register_flop_formula(torch.ops.fastmim.window_attention)
def _forward_flops(qkv, bias, logit_scale, num_heads, window_size, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return traffic(qkv, num_heads, window_size)[0][2]


@register_flop_formula(torch.ops.fastmim.window_attention_backward)
def _backward_flops(grad, qkv, bias, logit_scale, out, lse, num_heads, window_size, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]  # noqa: E501
    return traffic(qkv, num_heads, window_size)[1][2]


def _run(*args, impl: str) -> Tensor:  # type: ignore[no-untyped-def]
    return _run_op(*args, impl)[0]


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "torch": partial(_run, impl="torch"), "triton": partial(_run, impl="triton"),
    "reference": reference.window_attention}
