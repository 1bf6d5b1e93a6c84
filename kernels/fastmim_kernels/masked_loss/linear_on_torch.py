"""``linear_masked_l1`` in torch, loss and gradients a chunk of tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.cpu import onednn_multiplies
from ..common.rows import cast
from ..common.token_layout import (
    cover,
    loss_gradient_,
    loss_sum,
    masked_difference,
    normalised,
    patchify,
    pixel_scale,
    standardised,
    token_cells,
    token_chunks,
)
from ..linear.on_torch import input_gradient, product, weight_gradient
from .inputs import buffers, loss_dtype


def forward(tokens: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, mask: Tensor, mean: Tensor | None,
            std: Tensor | None, stride: int, loss: str, target_eps: float, count_eps: float, dtype: torch.dtype,
            grads: bool
            ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results of the op ``fastmim::linear_masked_l1``."""
    wide = loss_dtype(dtype, target.dtype)
    total = tokens.new_zeros((), dtype=wide)
    d_tokens, d_weight, d_bias = buffers(tokens, weight, bias, wide, grads)
    grid = tokens.shape[1:3]
    cells = token_cells(mask, target.shape[2:], grid, stride)
    patches = patchify(cover(grid, target, stride), stride).flatten(0, 2)
    # A product of bfloat16 takes some twenty times as long where the processor has none; its sums are in float32.
    slow = dtype == torch.bfloat16 and tokens.is_cpu and not onednn_multiplies(dtype)
    dtype, low = (torch.float32, dtype) if slow else (dtype, dtype)
    head, shift = weight.to(low).to(dtype), None if bias is None else bias.to(low).to(dtype)
    x, d_x = tokens.flatten(0, 2), d_tokens.flatten(0, 2) if grads else d_tokens
    first, exact, scale = True, dtype == wide, pixel_scale(target, mask, wide, count_eps)
    for rows, chosen in token_chunks(cells):
        chunk = x[rows].to(low).to(dtype)
        pixels = normalised(patches[rows].unflatten(1, (-1, stride, stride)), mean, std, wide)
        pixels = standardised(pixels, target_eps)
        difference = masked_difference(product(chunk, head, shift).to(low), pixels, chosen)
        total += loss_sum(difference, loss)
        if grads:
            slope = loss_gradient_(difference, loss).flatten(1)
            if bias is not None:
                d_bias += slope.sum(0)
            slope = slope.to(low).to(dtype)
            d_x[rows] = input_gradient(slope, head, None).to(d_x.dtype)
            if exact:
                chunk = chunk * scale  # a few rows, in place of a pass over the gradient of the weight
            if first:
                d_weight = weight_gradient(slope, chunk, wide)
            elif exact:
                d_weight.addmm_(slope.T, chunk)
            else:
                d_weight += weight_gradient(slope, chunk, dtype)
            first = False
    if grads and first:
        d_weight.zero_()
    # The factor is left to backward where a low precision would round or lose what it scales.
    return total * scale, scale, d_tokens, d_weight if exact else d_weight.mul_(scale), d_bias.mul_(scale)


def backward(grad: Tensor, scale: Tensor, d_tokens: Tensor, d_weight: Tensor, d_bias: Tensor,
             weight_dtype: torch.dtype, bias_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results of the op ``fastmim::linear_masked_l1_backward``."""
    # A 0-d factor would be rounded to the dtype of the tensor it scales: widen first.
    wide = scale.dtype
    d_tokens = cast(cast(d_tokens, wide) * (grad * scale), d_tokens.dtype)
    if not (grad.is_cpu and grad.item() == 1):  # as it is where this loss is the one that is minimised
        d_weight, d_bias = d_weight * grad, d_bias * grad
    return d_tokens, cast(d_weight, weight_dtype), cast(d_bias, bias_dtype)
