"""The linear head of SimMIM and its masked loss as one op, which computes its gradients in the forward pass.

Only tokens that contain masked pixels are projected, a chunk at a time. What is kept for backward are sums of
``l'(x̂ − x)·m`` times the head or the tokens, without the factor 1/(count·C)·grad: for the L1 loss the first
are products with −1, 0 and 1, exact in any precision, and no half-precision value is driven to underflow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from ..common.define_op import outside_autocast
from ..common.token_layout import (
    cover,
    loss_gradient_,
    loss_sum,
    masked_difference,
    normalised,
    patchify,
    pixel_scale,
    token_cells,
    token_chunks,
)

Grads = tuple[Tensor, Tensor, Tensor]


def linear_reference(tokens: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, mask: Tensor,
                     mean: Tensor | None, std: Tensor | None, stride: int, loss: str, dtype: torch.dtype) -> Tensor:
    """The whole prediction, then the oracle of the loss."""
    prediction = F.linear(tokens.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    wide = torch.promote_types(dtype, torch.float32) if mean is not None else target.dtype
    return reference.masked_l1(prediction, normalised(target, mean, std, wide), mask, stride, loss)


def linear_torch(*args) -> Tensor:  # type: ignore[no-untyped-def]
    return _op(*args, _wants_grad(*args), "torch")[0]


def linear_triton(*args) -> Tensor:  # type: ignore[no-untyped-def]
    return _op(*args, _wants_grad(*args), "triton")[0]


def linear_traffic(shape: tuple[int, int, int, int], dim: int, stride: int, mask_cells: int, *, masked: float,
                   itemsize: int = 2, target_itemsize: int = 4) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Least (bytes read, bytes written, FLOPs) of forward (which computes the gradients) and of backward.

    The gradient of the prediction of masked tokens makes one round trip; everything else moves once.

    Args:
        shape: (B, h, w, C): tokens and image channels; ``dim`` D of the tokens; ``mask_cells`` of the whole batch.
        masked: Share of tokens that are masked.
        itemsize, target_itemsize: Bytes of a value of tokens and head, and of the target.
    """
    b, h, w, c = shape
    n, k = b * h * w, c * stride**2
    m = round(n * masked)
    read = m * (dim * 2 * itemsize + k * target_itemsize + 2 * k * itemsize) + 2 * k * dim * itemsize + mask_cells
    written = m * k * itemsize + n * dim * itemsize + k * (dim + 1) * 4
    forward = (read, written, 6 * m * k * dim)
    moved = n * dim * itemsize + k * (dim + 1) * 4
    return forward, (moved, moved, 0)


def _wants_grad(tokens: Tensor, weight: Tensor, bias: Tensor | None, *_: object) -> bool:
    inputs = (tokens, weight) if bias is None else (tokens, weight, bias)
    return torch.is_grad_enabled() and any(t.requires_grad for t in inputs)


@torch.library.custom_op("fastmim::linear_masked_l1", mutates_args=())
def _op(tokens: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, mask: Tensor, mean: Tensor | None,
        std: Tensor | None, stride: int, loss: str, dtype: torch.dtype, grads: bool, impl: str
        ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, scale, and the gradients over scale: like tokens, like weight and bias in float32; empty without)."""
    args = (tokens, weight, bias, target, mask, mean, std, stride, loss, dtype, grads)
    if impl == "triton":
        from . import linear_on_triton as kernels
        return kernels.forward(*args)
    total, found = _forward(*args)
    scale = pixel_scale(target, mask, total.dtype)
    return total * scale, scale, *found


@_op.register_fake
def _(tokens: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, mask: Tensor, mean: Tensor | None,
      std: Tensor | None, stride: int, loss: str, dtype: torch.dtype, grads: bool, impl: str
      ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(torch.promote_types(dtype, torch.float32), _target_dtype(target))
    scalar = tokens.new_empty((), dtype=wide)
    return scalar, torch.empty_like(scalar), *_buffers(tokens, weight, bias, wide, grads)


def _target_dtype(target: Tensor) -> torch.dtype:
    return torch.float32 if target.dtype == torch.uint8 else target.dtype


def _buffers(tokens: Tensor, weight: Tensor, bias: Tensor | None, wide: torch.dtype, grads: bool) -> Grads:
    """d tokens and d bias are zero, d weight is not set."""
    d_tokens = tokens.new_zeros(tokens.shape if grads else (0,))
    d_weight = tokens.new_empty(weight.shape if grads else (0,), dtype=wide)
    return d_tokens, d_weight, tokens.new_zeros(weight.shape[:1] if grads and bias is not None else (0,), dtype=wide)


def _forward(tokens: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, mask: Tensor, mean: Tensor | None,
             std: Tensor | None, stride: int, loss: str, dtype: torch.dtype, grads: bool) -> tuple[Tensor, Grads]:
    wide = torch.promote_types(torch.promote_types(dtype, torch.float32), _target_dtype(target))
    total = tokens.new_zeros((), dtype=wide)
    d_tokens, d_weight, d_bias = found = _buffers(tokens, weight, bias, wide, grads)
    grid = tokens.shape[1:3]
    cells = token_cells(mask, target.shape[2:], grid, stride)
    patches = patchify(cover(grid, target, stride), stride).flatten(0, 2)
    head, shift = weight.to(dtype), None if bias is None else bias.to(dtype)
    x, d_x = tokens.flatten(0, 2), d_tokens.flatten(0, 2) if grads else d_tokens
    first = True
    for rows, chosen in token_chunks(cells):
        chunk = x[rows].to(dtype)
        pixels = normalised(patches[rows].unflatten(1, (-1, stride, stride)), mean, std, wide)
        difference = masked_difference(F.linear(chunk, head, shift), pixels, chosen)
        total += loss_sum(difference, loss)
        if grads:
            slope = loss_gradient_(difference, loss).flatten(1)
            if bias is not None:
                d_bias += slope.sum(0)
            slope = slope.to(dtype)
            d_x[rows] = (slope @ head).to(d_x.dtype)
            if dtype == wide:
                # beta 0 ignores what the buffer holds.
                d_weight.addmm_(slope.T, chunk, beta=0 if first else 1)
            elif first:
                d_weight.copy_(slope.T @ chunk)
            else:
                d_weight += slope.T @ chunk
            first = False
    if grads and first:
        d_weight.zero_()
    return total, found


@torch.library.custom_op("fastmim::linear_masked_l1_backward", mutates_args=())
def _backward_op(grad: Tensor, scale: Tensor, d_tokens: Tensor, d_weight: Tensor, d_bias: Tensor,
                 weight_dtype: torch.dtype, bias_dtype: torch.dtype, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    if impl == "triton":
        from . import linear_on_triton as kernels
        return kernels.backward(grad, scale, d_tokens, d_weight, d_bias, weight_dtype, bias_dtype)
    factor = grad * scale
    # A 0-d factor would be rounded to the dtype of the tensor it scales: widen first.
    wide = factor.dtype
    return (d_tokens.to(wide) * factor).to(d_tokens.dtype), (d_weight * factor).to(weight_dtype), \
        (d_bias * factor).to(bias_dtype)


@_backward_op.register_fake
def _(grad: Tensor, scale: Tensor, d_tokens: Tensor, d_weight: Tensor, d_bias: Tensor, weight_dtype: torch.dtype,
      bias_dtype: torch.dtype, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(d_tokens), torch.empty_like(d_weight, dtype=weight_dtype), \
        torch.empty_like(d_bias, dtype=bias_dtype)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = inputs[1].dtype, torch.float32 if inputs[2] is None else inputs[2].dtype
    ctx.has_bias, ctx.impl = inputs[2] is not None, inputs[-1]


@outside_autocast
def _autograd(ctx, grad, *_):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 12
    d_tokens, d_weight, d_bias = _backward_op(grad, *ctx.saved_tensors, *ctx.dtypes, ctx.impl)
    return d_tokens, d_weight, d_bias if ctx.has_bias else None, *[None] * 9


torch.library.register_autograd("fastmim::linear_masked_l1", _autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.fastmim.linear_masked_l1)
def _flops(tokens, weight, *args, out_val=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """An upper bound: how many tokens are masked is data. One product forward and two for the gradients."""
    grads = args[-2]
    return 2 * tokens[0] * tokens[1] * tokens[2] * weight[0] * weight[1] * (3 if grads else 1)


@register_flop_formula(torch.ops.fastmim.linear_masked_l1_backward)
def _backward_flops(*args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 0
