"""``mask_tokens`` in torch: the path of CPUs, and of devices without Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.define_op import autograd_function
from ..common.rows import (
    cast,
    marked_sum,
    nothing,
    numbers_of,
    replaced_rows,
    shown_bits,
    statistics_dtype,
    sum_of_rows,
    zero_rows,
)


def forward(tokens: Tensor, mask: Tensor, mask_token: Tensor, weight: Tensor | None, bias: Tensor | None,
            pos_embed: Tensor | None, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results of the op ``fastmim::mask_tokens``."""
    tokens = tokens.contiguous()
    mean = rstd = tokens.new_empty(0, dtype=statistics_dtype(tokens.dtype))
    x = tokens
    if weight is not None:
        assert bias is not None
        wide = statistics_dtype(tokens.dtype)
        x, mean, rstd = torch.native_layer_norm(tokens.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
        mean, rstd = mean.squeeze(-1), rstd.squeeze(-1)
    # Never 0·inf.
    x = replaced_rows(x.to(out_dtype), shown_bits(mask, out_dtype), mask_token.reshape(-1).to(out_dtype))
    if pos_embed is not None:
        x += pos_embed.reshape(x.shape[1:])
    return x, mean, rstd if weight is not None else rstd.clone()


def composed(tokens: Tensor, mask: Tensor, mask_token: Tensor, weight: Tensor | None, bias: Tensor | None,
             pos_embed: Tensor | None, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Both results for training on a CPU without norm and position: there the gradient is found in few steps."""
    if not (tokens.is_cpu and torch.is_grad_enabled() and weight is None and pos_embed is None
            and tokens.dtype == out_dtype):
        return None
    x = _REPLACED.apply(tokens, mask, mask_token)
    return x, x


def _replaced(ctx: Any, tokens: Tensor, mask: Tensor, mask_token: Tensor) -> Tensor:
    """Keeps what the mask means to backward, some bytes a row."""
    tokens, shown = tokens.contiguous(), shown_bits(mask, tokens.dtype)
    ctx.save_for_backward(shown, numbers_of(mask))
    ctx.like = mask_token.shape, mask_token.dtype
    return replaced_rows(tokens, shown, cast(mask_token.reshape(-1), tokens.dtype))


def _replaced_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
    (shown, rows), grad, (shape, dtype) = ctx.saved_tensors, grad.contiguous(), ctx.like
    # First what reads the fewer rows: they are in cache then for the rest, which has a result to write.
    total = sum_of_rows(grad, rows)
    return zero_rows(grad, shown), None, cast(total.view(shape), dtype)


_REPLACED = autograd_function("replaced_tokens", _replaced, _replaced_backward)


def backward(grad: Tensor, more: Tensor | None, tokens: Tensor | None, mask: Tensor, mean: Tensor, rstd: Tensor,
             weight: Tensor | None, pos: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results of the op ``fastmim::mask_tokens_backward``."""
    grad = grad.contiguous() if more is None else grad.contiguous() + more.contiguous()
    wide = statistics_dtype(grad.dtype)
    d_pos = grad.sum(0, dtype=wide) if pos else nothing(grad, wide)
    d_token = marked_sum(grad, mask)
    d_tokens = zero_rows(grad, shown_bits(mask, grad.dtype))
    if weight is None or tokens is None:
        return cast(d_tokens, dtype), d_token.unsqueeze(0), d_pos
    statistics, inner = (mean.unsqueeze(-1), rstd.unsqueeze(-1)), mean.dtype
    d_tokens, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
        d_tokens.to(inner), tokens.contiguous().to(inner), weight.shape, *statistics, weight.to(inner),
        weight.to(inner), [True, True, True])
    sums = torch.stack((d_token, d_weight.to(wide), d_bias.to(wide)))
    return d_tokens.masked_fill_(mask.unsqueeze(-1), 0).to(dtype), sums, d_pos
