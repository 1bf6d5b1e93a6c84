"""The decoder's input of a masked autoencoder (MAE, He et al. 2022, section 3): kept tokens in their places, the mask
token in the others, positions added to all, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..common.arguments import FLOATING, explained, floating, within, wrong
from ..common.define_op import Kept, define_op
from ..common.rows import statistics_dtype
from . import on_torch


@explained(places="index")
def unshuffle(tokens: Tensor, places: Tensor, mask_token: Tensor, pos_embed: Tensor, *,
              out_dtype: torch.dtype | None = None, impl: str = "auto") -> Tensor:
    """``out[:, 0] = tokens[:, 0]``, ``out[:, 1 + l] = tokens[:, 1 + places[:, l]]`` or the mask token; + pos_embed.

    No gradient depends on the order of threads.

    Args:
        tokens: (B, 1 + K, C) floating point, the class token first.
        places: (B, L) int64; of each patch the number of its token among the K kept ones, each of which occurs once, or
            −1 where the patch is hidden. Numbers beyond these are refused on a CPU; a GPU does not look.
        mask_token: C values in any shape.
        pos_embed: (1 + L)·C values in any shape.
        out_dtype: Dtype of the result. Default: that of ``tokens``, promoted by ``pos_embed`` as an addition would.
        impl: See :mod:`fastmim_kernels.common.dispatch`.

    Returns:
        (B, 1 + L, C) in ``out_dtype``.

    Raises:
        ValueError: An argument is not what is said here.
    """
    _check(tokens, places, mask_token, pos_embed, out_dtype)
    dtype = torch.promote_types(tokens.dtype, pos_embed.dtype) if out_dtype is None else out_dtype
    return OP(tokens, places, mask_token, pos_embed, dtype, impl=impl)


def traffic(shape: tuple[int, int, int], patches: int, *, itemsize: int = 2, out_itemsize: int = 2,
            param_itemsize: int = 4, pos: bool = False) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Least (bytes read, bytes written, FLOPs) of forward and of backward.

    Args:
        shape: (B, 1 + K, C) of the tokens; ``patches`` is L.
        itemsize, out_itemsize, param_itemsize: Bytes of a value of the tokens, the result, a parameter.
        pos: Positions are learned.
    """
    b, kept, c = shape
    n, embed = b * (1 + patches), (1 + patches) * c
    index = 8 * b * patches
    forward = (b * kept * c * itemsize + index + (embed + c) * param_itemsize, n * c * out_itemsize, 0)
    backward = (n * c * out_itemsize + index, b * kept * c * itemsize + 4 * c + (4 * embed if pos else 0), 0)
    return forward, backward


def _check(tokens: Tensor, places: Tensor, mask_token: Tensor, pos_embed: Tensor, out_dtype: torch.dtype | None
           ) -> None:
    op, shape = "unshuffle", tokens.shape
    floating(op, tokens, mask_token, pos_embed)
    if len(shape) != 3 or not shape[1] or not shape[2]:
        raise wrong(op, "tokens", "(B, 1 + K, C), the class token first", tokens)
    if len(places.shape) != 2 or places.shape[0] != shape[0] or places.shape[1] < shape[1] - 1:
        raise wrong(op, "places", f"({shape[0]}, L) with L of at least {shape[1] - 1} for tokens of {tuple(shape)}",
                    places)
    if places.dtype != torch.int64:
        raise wrong(op, "places", "of int64", places)
    if mask_token.numel() != shape[2]:
        raise wrong(op, "mask_token", f"{shape[2]} values for tokens of {tuple(shape)}", mask_token)
    rows = 1 + places.shape[1]
    if pos_embed.numel() != rows * shape[2]:
        raise wrong(op, "pos_embed", f"as many values as {(rows, shape[2])} for places of {tuple(places.shape)}",
                    pos_embed)
    if out_dtype is not None and out_dtype not in FLOATING:
        raise wrong(op, "out_dtype", "float16, bfloat16, float32, float64 or None", out_dtype)
    within(op, "places", places, -1, shape[1] - 2, "numbers of kept tokens or -1")


def _fake(tokens: Tensor, places: Tensor, mask_token: Tensor, pos_embed: Tensor, out_dtype: torch.dtype, impl: str
          ) -> Tensor:
    return tokens.new_empty((tokens.shape[0], 1 + places.shape[1], tokens.shape[2]), dtype=out_dtype)


def _backward_fake(grad: Tensor, places: Tensor, kept: int, pos: bool, dtype: torch.dtype, impl: str
                   ) -> tuple[Tensor, Tensor, Tensor]:
    """(d tokens, (C,) d mask_token, (1 + L, C) d pos_embed or empty)."""
    wide = statistics_dtype(grad.dtype)
    embed = grad.new_empty(grad.shape[1:] if pos else (0,), dtype=wide)
    d_tokens = grad.new_empty((grad.shape[0], kept, grad.shape[2]), dtype=dtype)
    return d_tokens, grad.new_empty(grad.shape[2:], dtype=wide), embed


def _save(inputs: Any, outputs: Any) -> Any:
    tokens, places, mask_token, pos_embed, _, impl = inputs
    params = [(p.shape, p.dtype) for p in (mask_token, pos_embed)]
    return (places,), (params, tokens.shape[1], tokens.dtype, impl)


def _gradients(backward: Callable, kept: Kept, grad: Tensor) -> tuple[Tensor | None, ...]:
    params, count, dtype, impl = kept.settings
    pos = kept.needs[3]
    d_tokens, d_token, d_pos = backward(grad, *kept.tensors, count, pos, dtype, impl)
    (token_shape, token_dtype), (pos_shape, pos_dtype) = params
    d_token = d_token.reshape(token_shape).to(token_dtype)
    return d_tokens, None, d_token, d_pos.reshape(pos_shape).to(pos_dtype) if pos else None


def _reference(tokens: Tensor, places: Tensor, mask_token: Tensor, pos_embed: Tensor, out_dtype: torch.dtype) -> Tensor:
    return reference.unshuffle(tokens.to(out_dtype), places, mask_token.to(out_dtype), pos_embed).to(out_dtype)


OP = define_op("unshuffle", on_torch, ".on_triton", reference=_reference, fake=_fake, backward_fake=_backward_fake,
               save=_save, gradients=_gradients)
