"""Continuous relative position bias of SwinV2 (Swin Transformer V2, section 3.3), all blocks of a stage at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import reference
from .dispatch import resolve


def cpb_bias(coords: Tensor, index: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, *,
             impl: str = "auto") -> Tensor:
    """``16·sigmoid(relu(coords·W1ᵀ + b1)·W2ᵀ)`` looked up at ``index``, for L blocks.

    Args:
        coords: (T, 2) log-spaced relative coordinates, T = (2·wh − 1)(2·ww − 1).
        index: (N, N) int64 row of ``coords`` of each query/key pair.
        weight1: (L, K, 2) and bias1: (L, K), first layer of each block's MLP.
        weight2: (L, heads, K), second layer.

    Returns:
        (L, heads, N, N) float32 (float64 for float64 input): the additive attention bias of each block.

    Raises:
        ValueError: Shapes do not belong together.
    """
    if weight1.ndim != 3 or weight1.shape[2] != coords.shape[-1] or bias1.shape != weight1.shape[:2] \
            or weight2.ndim != 3 or weight2.shape[::2] != bias1.shape:
        raise ValueError(
            "cpb_bias: weight1 must be (L, K, 2), bias1 (L, K), weight2 (L, heads, K), got "
            f"{tuple(weight1.shape)}, {tuple(bias1.shape)}, {tuple(weight2.shape)}"
        )
    functions = _FLOAT64 if weight1.dtype == torch.float64 else _IMPLEMENTATIONS
    function = resolve("cpb_bias", impl, functions, coords.device)
    # The MLP is tiny and its output decides logits of magnitude 16: always full precision.
    wide = torch.float64 if weight1.dtype == torch.float64 else torch.float32
    with torch.autocast(coords.device.type, enabled=False):
        return function(coords.detach().to(wide), index, weight1.to(wide), bias1.to(wide), weight2.to(wide))


def traffic(blocks: int, heads: int, rows: int, pairs: int, hidden: int = 512
            ) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Least (bytes read, bytes written, FLOPs) of forward and of backward, all in float32.

    Args:
        blocks: L; ``heads`` of each; ``rows`` T of the coordinate table; ``pairs`` N² entries of a bias.
        hidden: K. The backward pass evaluates the first layer again instead of keeping it.
    """
    params = blocks * hidden * (3 + heads) * 4
    table, bias = blocks * heads * rows * 4, blocks * heads * pairs * 4
    first, second = 2 * blocks * rows * hidden * 2, 2 * blocks * rows * hidden * heads
    forward = (params + rows * 8 + pairs * 8, table + bias, first + second)
    return forward, (params + rows * 8 + pairs * 8 + table + bias, params, 2 * first + 2 * second)


@torch.library.custom_op("fastmim::cpb_bias", mutates_args=())
def _op(coords: Tensor, index: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, impl: str
        ) -> tuple[Tensor, Tensor]:
    """(the bias, the (L, heads, T) table over 16)."""
    table = torch.cat([torch.sigmoid(weight2[part] @ hidden.mT)
                       for part, hidden in _hidden(coords, weight1, bias1)])
    if impl == "triton":
        from .triton import cpb as kernels
        return kernels.look_up(table, index), table
    bias = table.index_select(2, index.reshape(-1)).mul_(16)
    return bias.unflatten(2, index.shape), table


@_op.register_fake
def _(coords: Tensor, index: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, impl: str
      ) -> tuple[Tensor, Tensor]:
    blocks, heads = weight2.shape[:2]
    return weight2.new_empty((blocks, heads, *index.shape)), weight2.new_empty((blocks, heads, coords.shape[0]))


@torch.library.custom_op("fastmim::cpb_bias_backward", mutates_args=())
def _backward_op(grad: Tensor, table: Tensor, coords: Tensor, index: Tensor, weight1: Tensor, bias1: Tensor,
                 weight2: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    grad = grad.contiguous()
    if impl == "triton":
        from .triton import cpb as kernels
        d_logit = kernels.scatter(grad, index, table)
    else:
        d_logit = _scatter(grad.flatten(2), index.reshape(-1), table.shape[2])
        d_logit.mul_(table).mul_(1 - table).mul_(16)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for part, hidden in _hidden(coords, weight1, bias1):
        d_weight2 = d_logit[part] @ hidden
        d_hidden = torch.ops.aten.threshold_backward(d_logit[part].mT @ weight2[part], hidden, 0)
        # Products instead of sums over the rows: one pass over d_hidden gives both.
        both = d_hidden.mT @ torch.cat((coords, coords.new_ones(len(coords), 1)), 1)
        found.append((both[..., :-1], both[..., -1], d_weight2))
    d_weight1, d_bias1, d_weight2 = (torch.cat(parts) for parts in zip(*found, strict=True))
    return d_weight1, d_bias1, d_weight2


@_backward_op.register_fake
def _(grad: Tensor, table: Tensor, coords: Tensor, index: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor,
      impl: str) -> tuple[Tensor, Tensor, Tensor]:
    return weight1.new_empty(weight1.shape), bias1.new_empty(bias1.shape), weight2.new_empty(weight2.shape)


def _hidden(coords: Tensor, weight1: Tensor, bias1: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """First layer of some blocks at a time: one on a CPU, where its 1 MB then stays in cache; all elsewhere."""
    step = 1 if coords.device.type == "cpu" else len(weight1)
    for start in range(0, len(weight1), step):
        part = slice(start, start + step)
        inputs = coords.expand(len(weight1[part]), -1, -1)
        yield part, torch.baddbmm(bias1[part, None], inputs, weight1[part].mT).relu_()


def _scatter(grad: Tensor, index: Tensor, rows: int) -> Tensor:
    """(L, heads, N²) summed into (L, heads, T) in a fixed order."""
    if grad.device.type == "cpu":  # one thread a line, in order
        return grad.new_zeros(*grad.shape[:2], rows).scatter_add_(2, index.expand_as(grad), grad)
    order, lengths = torch.argsort(index, stable=True), torch.bincount(index, minlength=rows)
    lines = grad.flatten(0, 1).mT.index_select(0, order)
    return torch.segment_reduce(lines, "sum", lengths=lengths, axis=0).mT.reshape(*grad.shape[:2], rows)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *inputs[:5])
    ctx.impl = inputs[5]


def _autograd(ctx, grad, _table):  # type: ignore[no-untyped-def]
    return None, None, *_backward_op(grad, *ctx.saved_tensors, ctx.impl), None


torch.library.register_autograd("fastmim::cpb_bias", _autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.fastmim.cpb_bias)
def _flops(coords, index, weight1, bias1, weight2, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return traffic(weight2[0], weight2[1], coords[0], index[0] * index[1], weight2[2])[0][2]


@register_flop_formula(torch.ops.fastmim.cpb_bias_backward)
def _backward_flops(grad, table, coords, index, weight1, bias1, weight2, *args, **kwargs  # type: ignore[no-untyped-def]
                    ) -> int:
    return traffic(weight2[0], weight2[1], coords[0], index[0] * index[1], weight2[2])[1][2]


def _torch(*args) -> Tensor:  # type: ignore[no-untyped-def]
    return _op(*args, "torch")[0]


def _triton(*args) -> Tensor:  # type: ignore[no-untyped-def]
    return _op(*args, "triton")[0]


_FLOAT64 = {"torch": _torch, "reference": reference.cpb_bias}
_IMPLEMENTATIONS = {**_FLOAT64, "triton": _triton}
