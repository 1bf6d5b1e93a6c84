"""Substitution of masked patch tokens by the mask token (SimMIM, section 3.1).

Optionally with the LayerNorm of the patch embedding before and the position embedding after, in one pass: the
tokens of hidden patches are then not even read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..common.arguments import as_mask, check_norm, explained, floating, wrong
from ..common.define_op import Kept, define_op
from ..common.rows import cast, statistics_dtype
from . import on_torch


@explained(mask="mask")
def mask_tokens(tokens: Tensor, mask: Tensor, mask_token: Tensor, *, norm_weight: Tensor | None = None,
                norm_bias: Tensor | None = None, eps: float = 1e-5, pos_embed: Tensor | None = None,
                out_dtype: torch.dtype | None = None, impl: str = "auto") -> Tensor:
    """The first result of :func:`mask_tokens_twice`."""
    return mask_tokens_twice(tokens, mask, mask_token, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps,
                             pos_embed=pos_embed, out_dtype=out_dtype, impl=impl)[0]


@explained(mask="mask")
def mask_tokens_twice(tokens: Tensor, mask: Tensor, mask_token: Tensor, *, norm_weight: Tensor | None = None,
                      norm_bias: Tensor | None = None, eps: float = 1e-5, pos_embed: Tensor | None = None,
                      out_dtype: torch.dtype | None = None, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Replace the masked tokens: ``LN(tokens)·(1−mask) + mask_token·mask + pos_embed``.

    The gradient of a masked token is an exact zero; no gradient depends on the order of threads.

    Args:
        tokens: (B, H, W, C) floating point.
        mask: (B, H, W) bool or 0/1; true where a patch is hidden. Other values are refused on a CPU; on a GPU, where
            the host would have to wait for them, all but 0 count as 1.
        mask_token: C values in any shape.
        norm_weight, norm_bias: (C,) of a LayerNorm before the substitution; None for no norm.
        eps: Of the LayerNorm.
        pos_embed: H·W·C values in any shape, added to every token; None for none.
        out_dtype: Dtype of the result. Default: that of ``tokens``; with a LayerNorm under autocast float32,
            as LayerNorm itself returns; promoted by ``pos_embed`` as an addition would.
        impl: See :mod:`fastmim_kernels.common.dispatch`.

    Returns:
        (B, H, W, C) in ``out_dtype``, twice: each for one reader, so that the gradients of two are added on the
        way (both are the same memory). Statistics are float32 (float64 for float64 tokens).

    Raises:
        ValueError: An argument is not what is said here.
    """
    _check(tokens, mask, mask_token, norm_weight, norm_bias, pos_embed)
    check_norm("mask_tokens", eps, out_dtype=out_dtype)
    if out_dtype is None:
        out_dtype = tokens.dtype
        if norm_weight is not None and torch.is_autocast_enabled(tokens.device.type):
            out_dtype = torch.promote_types(out_dtype, torch.float32)
        if pos_embed is not None:
            out_dtype = torch.promote_types(out_dtype, pos_embed.dtype)
    mask = as_mask("mask_tokens", mask)
    return OP.hand_on(tokens, mask, mask_token, norm_weight, norm_bias, pos_embed, eps, out_dtype, impl=impl)


def traffic(shape: tuple[int, int, int, int], *, visible: float, itemsize: int = 2, out_itemsize: int = 2,
            param_itemsize: int = 4, norm: bool = False, pos: bool = False
            ) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Least (bytes read, bytes written, FLOPs) of forward and of backward.

    Args:
        shape: (B, H, W, C) of the tokens; ``visible`` is the share of tokens that are not masked.
        itemsize, out_itemsize, param_itemsize: Bytes of a value of the tokens, the result, a parameter.
        norm, pos: With LayerNorm, with position embedding.
    """
    b, h, w, c = shape
    n = b * h * w
    seen = round(n * visible)
    params = c * param_itemsize
    embed = h * w * params if pos else 0
    forward = (seen * c * itemsize + n + params * (3 if norm else 1) + embed,
               n * c * out_itemsize + (8 * n if norm else 0), 0)
    backward = (n * c * out_itemsize + n + (seen * (c * itemsize + 8) + params if norm else 0),
                n * c * itemsize + c * 4 * (3 if norm else 1) + (h * w * c * 4 if pos else 0), 0)
    return forward, backward


def _check(tokens: Tensor, mask: Tensor, mask_token: Tensor, weight: Tensor | None, bias: Tensor | None,
           pos_embed: Tensor | None) -> None:
    op, shape = "mask_tokens", tokens.shape
    floating(op, tokens, mask_token, weight, bias, pos_embed)
    if len(shape) != 4 or not shape[3]:
        raise wrong(op, "tokens", "(B, H, W, C)", tokens)
    if mask.shape != shape[:3]:
        raise wrong(op, "mask", f"{tuple(shape[:3])} for tokens of {tuple(shape)}", mask)
    if mask.dtype.is_complex:
        raise wrong(op, "mask", "of bool or 0 and 1", mask)
    if mask_token.numel() != shape[3]:
        raise wrong(op, "mask_token", f"{shape[3]} values for tokens of {tuple(shape)}", mask_token)
    if (weight is None) != (bias is None):
        raise wrong(op, *("norm_weight", "given with norm_bias") if weight is None else
                    ("norm_bias", "given with norm_weight"), None)
    if weight is not None and weight.shape != shape[3:]:
        raise wrong(op, "norm_weight", f"{tuple(shape[3:])} for tokens of {tuple(shape)}", weight)
    if bias is not None and bias.shape != shape[3:]:
        raise wrong(op, "norm_bias", f"{tuple(shape[3:])} for tokens of {tuple(shape)}", bias)
    if pos_embed is not None and pos_embed.numel() != shape[1] * shape[2] * shape[3]:
        raise wrong(op, "pos_embed", f"as many values as {tuple(shape[1:])} for tokens of {tuple(shape)}", pos_embed)


def _fake(tokens: Tensor, mask: Tensor, mask_token: Tensor, weight: Tensor | None, bias: Tensor | None,
          pos_embed: Tensor | None, eps: float, out_dtype: torch.dtype, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """(result, mean, rstd); the statistics are empty without a norm."""
    stats = tokens.new_empty(tokens.shape[:3] if weight is not None else (0,), dtype=statistics_dtype(tokens.dtype))
    return torch.empty_like(tokens, dtype=out_dtype, memory_format=torch.contiguous_format), stats, \
        torch.empty_like(stats)


def _backward_fake(grad: Tensor, more: Tensor | None, tokens: Tensor | None, mask: Tensor, mean: Tensor, rstd: Tensor,
                   weight: Tensor | None, pos: bool, dtype: torch.dtype, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """(d tokens, (1 or 3, C) d mask_token[, d weight, d bias], d position or empty); ``more`` is added to ``grad``."""
    wide = statistics_dtype(grad.dtype)
    embed = grad.new_empty(grad.shape[1:] if pos else (0,), dtype=wide)
    d_tokens = torch.empty_like(grad, dtype=dtype, memory_format=torch.contiguous_format)
    return d_tokens, grad.new_empty((1 if weight is None else 3, grad.shape[-1]), dtype=wide), embed


def _save(inputs: Any, outputs: Any) -> Any:
    tokens, mask, mask_token, weight, bias, pos_embed, _, _, impl = inputs
    _, mean, rstd = outputs
    params = [None if p is None else (p.shape, p.dtype) for p in (mask_token, weight, bias, pos_embed)]
    return (tokens if weight is not None else None, mask, mean, rstd, weight), (params, tokens.dtype, impl)


def _gradients(backward: Callable, kept: Kept, grad: Tensor | None, more: Tensor | None = None
               ) -> tuple[Tensor | None, ...]:
    if grad is None:
        grad, more = more, None
    params, dtype, impl = kept.settings
    d_tokens, sums, d_pos = backward(grad, more, *kept.tensors, params[3] is not None, dtype, impl)
    found = [*sums.unbind(0), *(None,) * (3 - len(sums)), d_pos]
    d_params = [None if like is None else cast(d.view(like[0]), like[1]) for d, like in zip(found, params, strict=True)]
    return d_tokens, None, *d_params


def _moved(args: Sequence[Any], visible: float) -> tuple[int, int]:
    x, _, _, weight, _, pos, _, out_dtype, _ = args
    (read, written, _), _ = traffic(tuple(x.shape), visible=visible, itemsize=x.element_size(),
                                    out_itemsize=out_dtype.itemsize, norm=weight is not None, pos=pos is not None)
    return read, written


def _backward_moved(args: Sequence[Any], visible: float) -> tuple[int, int]:
    grad, more, _, _, _, _, weight, pos, dtype, _ = args
    _, (read, written, _) = traffic(tuple(grad.shape), visible=visible, itemsize=dtype.itemsize,
                                    out_itemsize=grad.element_size(), norm=weight is not None, pos=pos)
    return read + (0 if more is None else more.numel() * more.element_size()), written


def _reference(tokens: Tensor, mask: Tensor, mask_token: Tensor, weight: Tensor | None, bias: Tensor | None,
               pos_embed: Tensor | None, eps: float, out_dtype: torch.dtype) -> Tensor:
    if weight is not None and bias is not None:
        dtype = torch.promote_types(torch.promote_types(tokens.dtype, weight.dtype), bias.dtype)
        tokens = F.layer_norm(tokens.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps)
    x = reference.mask_tokens(tokens.to(out_dtype), mask, mask_token)
    return x if pos_embed is None else (x + pos_embed.reshape(x.shape[1:])).to(out_dtype)


OP = define_op("mask_tokens", on_torch, ".on_triton", reference=_reference, fake=_fake, backward_fake=_backward_fake,
               save=_save, gradients=_gradients, readers=lambda inputs, outputs: (outputs[0], outputs[0]),
               moved=_moved, backward_moved=_backward_moved)
