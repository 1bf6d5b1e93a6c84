"""The linear head of SimMIM or MAE and its masked loss as one op, which computes its gradients in the forward pass.

Only tokens that contain masked pixels are projected, a chunk at a time. What is kept for backward are sums of
``l'(x̂ − x)·m`` times the head or the tokens, without the factor 1/(count·C)·grad: for the L1 loss the first
are products with −1, 0 and 1, exact in any precision, and no half-precision value is driven to underflow.
In torch those of the head, which are float32 at least, are scaled by 1/(count·C) at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..common.arguments import check_product, explained, floating, whole, wrong
from ..common.define_op import Kept, define_op
from ..common.token_layout import EPS, normalised
from . import linear_on_torch
from .inputs import buffers, check, loss_dtype, prepared


@explained(mask="mask", target="pixels")
def linear_masked_l1(tokens: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, mask: Tensor, *,
                     stride: int, loss: str = "l1", mean: Tensor | None = None, std: Tensor | None = None,
                     target_eps: float = 0.0, count_eps: float = EPS, impl: str = "auto") -> Tensor:
    """:func:`.op.masked_l1` of ``tokens·weightᵀ + bias``: a linear head and its loss, SimMIM's or MAE's.

    Only tokens that contain masked pixels are projected, and loss and gradients are computed chunk by chunk,
    so that the prediction never exists as a whole. The gradients are computed in the forward pass.

    Args:
        tokens: (B, h, w, D).
        weight: (C·stride², D) and bias: (C·stride²,) or None, the 1×1 convolution of the head.
        target_eps: Above 0, the target of a token is its pixels by their own mean and unbiased deviation over all
            channels, (t − mean) / √(variance + target_eps) (MAE, section 4.1); tokens then lie within the image.
        count_eps: Added to the number of masked pixels; MAE adds nothing.

    Under autocast the products run in its dtype and the loss in float32. The other arguments, the result and
    the errors are those of :func:`.op.masked_l1`.
    """
    stride = whole(stride)
    floating("linear_masked_l1", weight, bias)
    values = check("linear_masked_l1", tokens, "tokens", target, mask, stride, loss, mean, std)
    check_product("linear_masked_l1", tokens, "tokens", weight, "weight", bias, "bias")
    if weight.shape[0] != values:
        raise wrong("linear_masked_l1", "weight", f"({values}, D), C·stride² for target of {tuple(target.shape)}",
                    weight)
    _check_eps(tokens, target, stride, values, target_eps, count_eps)
    device = tokens.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype
    dtype = tokens.dtype if tokens.dtype == torch.float64 else dtype
    grads = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (tokens, weight, bias))
    given = *prepared("linear_masked_l1", target, mask, mean, std), stride, loss, float(target_eps), float(count_eps)
    return OP(tokens, weight, bias, *given, dtype, grads, impl=impl)


def _check_eps(tokens: Tensor, target: Tensor, stride: int, values: int, target_eps: float, count_eps: float) -> None:
    for name, eps in (("target_eps", target_eps), ("count_eps", count_eps)):
        if not 0 <= eps < math.inf:
            raise wrong("linear_masked_l1", name, "a number of at least 0", eps)
    covered = tuple(edge * stride for edge in tokens.shape[1:3])
    if target_eps and (covered != tuple(target.shape[2:]) or values < 2):
        raise wrong("linear_masked_l1", "target_eps", "0 unless tokens of two values or more cover the target exactly: "
                    f"here {covered} pixels for {tuple(target.shape[2:])}", target_eps)


def linear_traffic(shape: tuple[int, int, int, int], dim: int, stride: int, mask_cells: int, *, masked: float,
                   itemsize: int = 2, target_itemsize: int = 4, statistics: bool = False
                   ) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Least (bytes read, bytes written, FLOPs) of forward (which computes the gradients) and of backward.

    The gradient of the prediction of masked tokens makes one round trip; everything else moves once.

    Args:
        shape: (B, h, w, C): tokens and image channels; ``dim`` D of the tokens; ``mask_cells`` of the whole batch.
        masked: Share of tokens that are masked.
        itemsize, target_itemsize: Bytes of a value of tokens and head, and of the target.
        statistics: The target is read once more, for those of each token.
    """
    b, h, w, c = shape
    n, k = b * h * w, c * stride**2
    m = round(n * masked)
    read = m * (dim * 2 * itemsize + k * target_itemsize + 2 * k * itemsize) + 2 * k * dim * itemsize + mask_cells
    read += m * (k * target_itemsize + 8) if statistics else 0
    written = m * k * itemsize + (8 * m if statistics else 0) + n * dim * itemsize + k * (dim + 1) * 4
    forward = (read, written, 6 * m * k * dim)
    moved = n * dim * itemsize + k * (dim + 1) * 4
    return forward, (moved, moved, 0)


def _fake(tokens: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, mask: Tensor, mean: Tensor | None,
          std: Tensor | None, stride: int, loss: str, target_eps: float, count_eps: float, dtype: torch.dtype,
          grads: bool, impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, scale, and the gradients over scale: like tokens, like weight and bias in float32; empty without)."""
    wide = loss_dtype(dtype, target.dtype)
    scalar = tokens.new_empty((), dtype=wide)
    return scalar, torch.empty_like(scalar), *buffers(tokens, weight, bias, wide, grads)


def _backward_fake(grad: Tensor, scale: Tensor, d_tokens: Tensor, d_weight: Tensor, d_bias: Tensor,
                   weight_dtype: torch.dtype, bias_dtype: torch.dtype, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(d_tokens), torch.empty_like(d_weight, dtype=weight_dtype), \
        torch.empty_like(d_bias, dtype=bias_dtype)


def _save(inputs: Any, outputs: Any) -> Any:
    _, weight, bias, *_, impl = inputs
    return outputs[1:], (weight.dtype, None if bias is None else bias.dtype, impl)


def _gradients(backward: Callable, kept: Kept, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight_dtype, bias_dtype, impl = kept.settings
    d_tokens, d_weight, d_bias = backward(grad, *kept.tensors, weight_dtype, bias_dtype or torch.float32, impl)
    return d_tokens, d_weight, None if bias_dtype is None else d_bias


def _flops(tokens: Any, weight: Any, *args: Any) -> int:
    """An upper bound: how many tokens are masked is data. One product forward and two for the gradients."""
    grads = args[-2]
    return 2 * tokens[0] * tokens[1] * tokens[2] * weight[0] * weight[1] * (3 if grads else 1)


def _reference(tokens: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, mask: Tensor,
               mean: Tensor | None, std: Tensor | None, stride: int, loss: str, target_eps: float, count_eps: float,
               dtype: torch.dtype, grads: bool) -> Tensor:
    """The whole prediction, then the oracle of the loss."""
    prediction = F.linear(tokens.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    wide = torch.promote_types(dtype, torch.float32) if mean is not None else target.dtype
    target = normalised(target, mean, std, wide)
    target = reference.patch_target(target, stride, target_eps) if target_eps else target
    return reference.masked_l1(prediction, target, mask, stride, loss, count_eps)


OP = define_op("linear_masked_l1", linear_on_torch, ".linear_on_triton", reference=_reference, fake=_fake,
               backward_fake=_backward_fake, save=_save, gradients=_gradients, flops=_flops)
