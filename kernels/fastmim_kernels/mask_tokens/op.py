"""Substitution of masked patch tokens by the mask token (SimMIM, section 3.1).

Optionally with the LayerNorm of the patch embedding before and the position embedding after, in one pass: the
tokens of hidden patches are then not even read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from ..common.define_op import outside_autocast
from ..common.dispatch import resolve


def mask_tokens(tokens: Tensor, mask: Tensor, mask_token: Tensor, *, norm_weight: Tensor | None = None,
                norm_bias: Tensor | None = None, eps: float = 1e-5, pos_embed: Tensor | None = None,
                out_dtype: torch.dtype | None = None, impl: str = "auto") -> Tensor:
    """The first result of :func:`mask_tokens_twice`."""
    return mask_tokens_twice(tokens, mask, mask_token, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps,
                             pos_embed=pos_embed, out_dtype=out_dtype, impl=impl)[0]


def mask_tokens_twice(tokens: Tensor, mask: Tensor, mask_token: Tensor, *, norm_weight: Tensor | None = None,
                      norm_bias: Tensor | None = None, eps: float = 1e-5, pos_embed: Tensor | None = None,
                      out_dtype: torch.dtype | None = None, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Replace the masked tokens: ``LN(tokens)·(1−mask) + mask_token·mask + pos_embed``.

    The gradient of a masked token is an exact zero; no gradient depends on the order of threads.

    Args:
        tokens: (B, H, W, C) floating point.
        mask: (B, H, W) bool or 0/1; true where a patch is hidden.
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
        ValueError: Shapes do not belong together, or one of ``norm_weight`` and ``norm_bias`` is missing.
    """
    _check(tokens, mask, mask_token, norm_weight, norm_bias, pos_embed)
    function = resolve("mask_tokens", impl, _FLOAT64 if tokens.dtype == torch.float64 else _IMPLEMENTATIONS,
                       tokens.device)
    if out_dtype is None:
        out_dtype = tokens.dtype
        if norm_weight is not None and torch.is_autocast_enabled(tokens.device.type):
            out_dtype = torch.promote_types(out_dtype, torch.float32)
        if pos_embed is not None:
            out_dtype = torch.promote_types(out_dtype, pos_embed.dtype)
    mask = mask if mask.dtype == torch.bool else mask != 0
    with torch.autocast(tokens.device.type, enabled=False):
        return function(tokens, mask, mask_token, norm_weight, norm_bias, pos_embed, eps, out_dtype)


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
    if tokens.ndim != 4 or mask.shape != tokens.shape[:3] or mask_token.numel() != tokens.shape[-1]:
        raise ValueError(
            "mask_tokens: tokens must be (B, H, W, C) with mask (B, H, W) and C mask_token values, got "
            f"tokens {tuple(tokens.shape)}, mask {tuple(mask.shape)}, mask_token {tuple(mask_token.shape)}"
        )
    c = tokens.shape[-1]
    if (weight is None) != (bias is None) or (weight is not None and bias is not None
                                              and (weight.shape != (c,) or bias.shape != (c,))):
        raise ValueError(f"mask_tokens: norm_weight and norm_bias must both be ({c},) or both be None")
    if pos_embed is not None and pos_embed.numel() != tokens[0].numel():
        raise ValueError(f"mask_tokens: pos_embed must hold {tuple(tokens.shape[1:])} values, got "
                         f"{tuple(pos_embed.shape)}")


def _reference(tokens: Tensor, mask: Tensor, mask_token: Tensor, weight: Tensor | None, bias: Tensor | None,
               pos_embed: Tensor | None, eps: float, out_dtype: torch.dtype) -> Tensor:
    if weight is not None:
        dtype = torch.promote_types(tokens.dtype, weight.dtype)
        tokens = F.layer_norm(tokens.to(dtype), weight.shape, weight, bias, eps)
    x = reference.mask_tokens(tokens.to(out_dtype), mask, mask_token)
    return x if pos_embed is None else (x + pos_embed.reshape(x.shape[1:])).to(out_dtype)


@torch.library.custom_op("fastmim::mask_tokens", mutates_args=())
def _op(tokens: Tensor, mask: Tensor, mask_token: Tensor, weight: Tensor | None, bias: Tensor | None,
        pos_embed: Tensor | None, eps: float, out_dtype: torch.dtype, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    tokens = tokens.contiguous()
    if impl == "triton":
        from . import on_triton as kernels
        return kernels.forward(tokens, mask.contiguous(), mask_token, weight, bias, pos_embed, eps, out_dtype)
    return _forward(tokens, mask, mask_token, weight, bias, pos_embed, eps, out_dtype)


@_op.register_fake
def _(tokens: Tensor, mask: Tensor, mask_token: Tensor, weight: Tensor | None, bias: Tensor | None,
      pos_embed: Tensor | None, eps: float, out_dtype: torch.dtype, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    stats = tokens.new_empty(tokens.shape[:3] if weight is not None else (0,), dtype=_wide(tokens.dtype))
    return torch.empty_like(tokens, dtype=out_dtype, memory_format=torch.contiguous_format), stats, \
        torch.empty_like(stats)


@torch.library.custom_op("fastmim::mask_tokens_backward", mutates_args=())
def _backward_op(grad: Tensor, more: Tensor | None, tokens: Tensor | None, mask: Tensor, mean: Tensor, rstd: Tensor,
                 weight: Tensor | None, pos: bool, dtype: torch.dtype, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """(d tokens, (1 or 3, C) d mask_token[, d weight, d bias], d position or empty); ``more`` is added to ``grad``."""
    grad, more = grad.contiguous(), None if more is None else more.contiguous()
    if tokens is not None:
        tokens = tokens.contiguous()
    if impl == "triton":
        from . import on_triton as kernels
        return kernels.backward(grad, more, tokens, mask.contiguous(), mean, rstd, weight, pos, dtype)
    grad = grad if more is None else grad + more
    return _backward(grad, tokens, mask, mean, rstd, weight, pos, dtype)


@_backward_op.register_fake
def _(grad: Tensor, more: Tensor | None, tokens: Tensor | None, mask: Tensor, mean: Tensor, rstd: Tensor,
      weight: Tensor | None, pos: bool, dtype: torch.dtype, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(grad.dtype)
    embed = grad.new_empty(grad.shape[1:] if pos else (0,), dtype=wide)
    d_tokens = torch.empty_like(grad, dtype=dtype, memory_format=torch.contiguous_format)
    return d_tokens, grad.new_empty((1 if weight is None else 3, grad.shape[-1]), dtype=wide), embed


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _forward(tokens: Tensor, mask: Tensor, mask_token: Tensor, weight: Tensor | None, bias: Tensor | None,
             pos_embed: Tensor | None, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    mean = rstd = tokens.new_empty(0, dtype=_wide(tokens.dtype))
    x = tokens
    if weight is not None:
        assert bias is not None
        wide = _wide(tokens.dtype)
        x, mean, rstd = torch.native_layer_norm(tokens.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
        mean, rstd = mean.squeeze(-1), rstd.squeeze(-1)
    # The gradient of a masked token is an exact zero, never 0·inf.
    x = torch.where(mask.unsqueeze(-1), mask_token.reshape(-1).to(out_dtype), x.to(out_dtype))
    if pos_embed is not None:
        x += pos_embed.reshape(x.shape[1:])
    return x, mean, rstd if weight is not None else rstd.clone()


def _backward(grad: Tensor, tokens: Tensor | None, mask: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None,
              pos: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(grad.dtype)
    hidden = mask.unsqueeze(-1)
    d_pos = grad.sum(0, dtype=wide) if pos else grad.new_empty(0, dtype=wide)
    d_token = torch.where(hidden, grad, 0).sum((0, 1, 2), dtype=wide)
    d_tokens = torch.where(hidden, 0, grad)
    if weight is None or tokens is None:
        return d_tokens.to(dtype), d_token[None], d_pos
    statistics = mean.unsqueeze(-1), rstd.unsqueeze(-1)
    d_tokens, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
        d_tokens.to(wide), tokens.to(wide), weight.shape, *statistics, weight.to(wide), weight.to(wide),
        [True, True, True])
    return d_tokens.masked_fill_(hidden, 0).to(dtype), torch.stack((d_token, d_weight, d_bias)), d_pos


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    tokens, mask, mask_token, weight, bias, pos_embed, _, _, impl = inputs
    _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(tokens if weight is not None else None, mask, mean, rstd, weight)
    ctx.impl, ctx.dtype = impl, tokens.dtype
    ctx.params = [None if p is None else (p.shape, p.dtype) for p in (mask_token, weight, bias, pos_embed)]


@outside_autocast
def _autograd(ctx, grad, _mean, _rstd, more=None):  # type: ignore[no-untyped-def]
    if grad is None:
        grad, more = more, None
    if grad is None:
        return (None,) * 9
    tokens, mask, mean, rstd, weight = ctx.saved_tensors
    d_tokens, sums, d_pos = _backward_op(grad, more, tokens, mask, mean, rstd, weight, ctx.params[3] is not None,
                                         ctx.dtype, ctx.impl)
    found = [*sums, *(None,) * (3 - len(sums)), d_pos]
    d_params = [None if like is None else d.reshape(like[0]).to(like[1])
                for d, like in zip(found, ctx.params, strict=True)]
    return d_tokens, None, *d_params, None, None, None


class _TwoReaders(torch.autograd.Function):
    """The op with its result twice, so that the backward pass adds the gradients of two readers on its way."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output = _op(*args)
        _setup_context(ctx, args, output)
        return *output, output[0].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return _autograd(ctx, *grads)


torch.library.register_autograd("fastmim::mask_tokens", _autograd, setup_context=_setup_context)


# No matrix product inside; torch's counter counts nothing else either.
@register_flop_formula([torch.ops.fastmim.mask_tokens, torch.ops.fastmim.mask_tokens_backward])
def _flops(*args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 0


def _run(*args: Any, impl: str) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        x = _op(*args, impl)[0]
        return x, x
    x, _, _, again = _TwoReaders.apply(*args, impl)
    return x, again


def _reference_twice(*args: Any) -> tuple[Tensor, Tensor]:
    x = _reference(*args)
    return x, x


_FLOAT64: dict[str, Callable] = {"torch": partial(_run, impl="torch"), "reference": _reference_twice}
_IMPLEMENTATIONS: dict[str, Callable] = {**_FLOAT64, "triton": partial(_run, impl="triton")}
