"""The MLP of a transformer block: linear, exact GELU, linear, with only its input and pre-activation kept.

Autograd would keep the activation too. Here backward computes it again in the pass that it makes over the
pre-activation anyway (on a GPU within the product that gives its gradient), but for small bfloat16 ones on a CPU; with
``recompute_fc1`` it also repeats the first product and keeps the input alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..common.arguments import check_product, explained, floating, wrong
from ..common.define_op import Kept, define_op
from ..common.rows import cast, statistics_dtype
from ..linear.op import check_low, fitting, product_dtype
from . import on_torch


@explained()
def mlp(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, *,
        low_weight1: Tensor | None = None, low_weight2: Tensor | None = None, recompute_fc1: bool = False,
        impl: str = "auto") -> Tensor:
    """``GELU(x·W1ᵀ + b1)·W2ᵀ + b2``.

    Computed in autocast's dtype where it is on, else in the dtype of x; parameters are cast once for forward
    and backward together, and their gradients come in their own dtype.

    Args:
        x: (…, C) floating point.
        weight1: (K, C) and bias1: (K,) or None, the first layer.
        weight2: (D, K) and bias2: (D,) or None, the second layer. ``residual_norm`` can add bias2 instead.
        low_weight1, low_weight2: The weights in the dtype of the computation already, where the caller has cast
            all parameters of a step at once. Gradients go to ``weight1`` and ``weight2`` only.
        recompute_fc1: Keep x only, at the cost of the first product once more in backward.
        impl: See :mod:`fastmim_kernels.common.dispatch`. "triton": GELU and bias1 are part of the first product, the
            GELU's gradient and d bias1 of the product before it; the other products are cuBLAS's.

    Returns:
        (…, D).

    Raises:
        ValueError: An argument is not what is said here.
    """
    return OP(*arguments(x, weight1, bias1, weight2, bias2, low_weight1, low_weight2, recompute_fc1, product_dtype(x)),
              impl=impl)


@explained()
def mlp_and_input(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, *,
                  low_weight1: Tensor | None = None, low_weight2: Tensor | None = None, recompute_fc1: bool = False,
                  impl: str = "auto") -> tuple[Tensor, Tensor]:
    """(:func:`mlp`, x), the second for another reader of x: one product then adds both gradients up."""
    dtype = product_dtype(x)
    args = arguments(x, weight1, bias1, weight2, bias2, low_weight1, low_weight2, recompute_fc1, dtype)
    return OP.hand_on(*args, impl=impl) if x.dtype == dtype else (OP(*args, impl=impl), x)


def arguments(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None,
              low_weight1: Tensor | None, low_weight2: Tensor | None, recompute_fc1: bool, dtype: torch.dtype
              ) -> tuple[Any, ...]:
    """Those of the op, for products in ``dtype``; checked."""
    floating("mlp", x, weight1, bias1, weight2, bias2, low_weight1, low_weight2)
    check_product("mlp", x, "x", weight1, "weight1", bias1, "bias1")
    # What the second layer reads has a channel for each row of weight1.
    if weight2.ndim != 2 or weight2.shape[1] != weight1.shape[0] or not weight2.shape[0]:
        raise wrong("mlp", "weight2", f"(D, {weight1.shape[0]}) for weight1 of {tuple(weight1.shape)}", weight2)
    if bias2 is not None and bias2.shape != weight2.shape[:1]:
        raise wrong("mlp", "bias2", f"{tuple(weight2.shape[:1])} for weight2 of {tuple(weight2.shape)}", bias2)
    if recompute_fc1 is not False and recompute_fc1 is not True:
        raise wrong("mlp", "recompute_fc1", "True or False", recompute_fc1)
    if low_weight1 is not None or low_weight2 is not None:
        check_low("mlp", "low_weight1", low_weight1, weight1)
        check_low("mlp", "low_weight2", low_weight2, weight2)
    # Without a graph the pre-activation is of no use to anybody: its buffer takes the activation.
    recompute_fc1 = recompute_fc1 or not torch.is_grad_enabled()
    return (cast(x, dtype), weight1, bias1, weight2, bias2, fitting(low_weight1, dtype), fitting(low_weight2, dtype),
            recompute_fc1)


def traffic(rows: int, channels: int, hidden: int, out_channels: int | None = None, *, itemsize: int = 2,
            param_itemsize: int = 4, bias: bool = True, recompute_fc1: bool = False, low_weights: bool = False
            ) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(bytes read, bytes written, FLOPs) of forward and of backward: each product's operands and results once.

    Args:
        rows, channels, hidden, out_channels: M, C, K and D (default C).
        itemsize, param_itemsize: Bytes of a value of x, of a parameter (cast first where they differ).
        bias: Both layers have one.
        recompute_fc1: As of :func:`mlp`.
        low_weights: The weights come cast already.
    """
    out_channels = channels if out_channels is None else out_channels
    weights = hidden * (channels + out_channels)
    x, h, y = (rows * n * itemsize for n in (channels, hidden, out_channels))
    w1, w2 = hidden * channels * itemsize, hidden * out_channels * itemsize
    flops = 2 * rows * weights
    own = weights if itemsize != param_itemsize and not low_weights else 0
    b1, b2 = hidden * param_itemsize * bias, out_channels * param_itemsize * bias
    forward = (x + w1 + b1 + h + w2 + b2 + own * param_itemsize, h * (2 - recompute_fc1) + y + own * itemsize, flops)
    # d hidden with the activation again, d W2, d W1, d x; the gradients of the biases come with the products.
    read = (y + w2 + h) + (y + h) + (h + x) + (h + w1) + (x + w1 + b1) * recompute_fc1
    written = 2 * h + weights * param_itemsize + x + h * recompute_fc1 + 4 * (hidden + out_channels) * bias
    return forward, (read, written, 2 * flops + 2 * rows * hidden * channels * recompute_fc1)


def _fake(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None,
          low_weight1: Tensor | None, low_weight2: Tensor | None, recompute_fc1: bool, impl: str
          ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(result, pre-activation, W1, W2 in the dtype of x, activation); empty: recomputed, given, or in that dtype."""
    pre = (0,) if recompute_fc1 else (x.numel() // x.shape[-1], weight1.shape[0])
    low1, low2 = (x.new_empty((0,) if w.dtype == x.dtype or given is not None else w.shape)
                  for w, given in ((weight1, low_weight1), (weight2, low_weight2)))
    kept = pre if impl == "torch" and on_torch.keeps_activation(x, weight1.shape[0], recompute_fc1) else (0,)
    return x.new_empty((*x.shape[:-1], weight2.shape[0])), x.new_empty(pre), low1, low2, x.new_empty(kept)


def _backward_fake(grad: Tensor, x: Tensor, pre: Tensor, activation: Tensor, weight1: Tensor, bias1: Tensor | None,
                   weight2: Tensor, has_bias2: bool, weight1_dtype: torch.dtype, weight2_dtype: torch.dtype, impl: str,
                   add: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(d x + ``add``, d W1, d b1, d W2, d b2), the weights' in the dtypes given; what is empty is recomputed."""
    wide = statistics_dtype(x.dtype)
    return (x.new_empty(x.shape), weight1.new_empty(weight1.shape, dtype=weight1_dtype),
            x.new_empty((0,) if bias1 is None else bias1.shape, dtype=wide),
            weight2.new_empty(weight2.shape, dtype=weight2_dtype),
            x.new_empty(weight2.shape[0] if has_bias2 else 0, dtype=wide))


def _save(inputs: Any, outputs: Any) -> Any:
    x, weight1, bias1, weight2, bias2, given1, given2, _, impl = inputs
    _, pre, low1, low2, activation = outputs
    low1, low2 = (low if low.numel() else weight if given is None else given
                  for low, given, weight in ((low1, given1, weight1), (low2, given2, weight2)))
    bias_dtypes = [None if b is None else b.dtype for b in (bias1, bias2)]
    settings = bias2 is not None, weight1.dtype, weight2.dtype, impl
    return (x, pre, activation, low1, bias1, low2), (bias_dtypes, settings)


def _gradients(backward: Callable, kept: Kept, grad: Tensor | None, add: Tensor | None = None
               ) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (add,)
    bias_dtypes, settings = kept.settings
    dx, dw1, db1, dw2, db2 = backward(grad, *kept.tensors, *settings, add)
    db1, db2 = (None if dtype is None else cast(b, dtype) for b, dtype in zip((db1, db2), bias_dtypes, strict=True))
    return dx, dw1, db1, dw2, db2


def _flops(x: Any, weight1: Any, bias1: Any, weight2: Any, *_: Any) -> int:
    return 2 * math.prod(x[:-1]) * weight1[0] * (weight1[1] + weight2[0])


def _backward_flops(grad: Any, x: Any, pre: Any, activation: Any, weight1: Any, bias1: Any, weight2: Any, *_: Any
                    ) -> int:
    recomputed = 2 * math.prod(x) * weight1[0] if pre[0] == 0 else 0
    return 2 * _flops(x, weight1, bias1, weight2) + recomputed


def _reference(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None,
               *rest: Any) -> Tensor:
    low1, low2 = (None if b is None else b.to(x.dtype) for b in (bias1, bias2))
    return reference.mlp(x, weight1.to(x.dtype), low1, weight2.to(x.dtype), low2)


OP = define_op("mlp", on_torch, ".on_triton", reference=_reference, fake=_fake, backward_fake=_backward_fake,
               save=_save, gradients=_gradients, readers=lambda inputs, outputs: (outputs[0], inputs[0]),
               flops=_flops, backward_flops=_backward_flops)
