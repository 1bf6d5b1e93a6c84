"""Position bias of all blocks of an encoder at once: SwinV2's continuous one (section 3.3) and Swin's tables.

One evaluation a step for every stage together: stages have different windows and heads, so the op works on flat
tensors, and a :class:`BiasPlan`, made once for a model, says where each block's part of them lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..common.chain import Backward, Forward, define_chain
from ..common.define_op import Kept, define_op
from ..common.rows import exactly, statistics_dtype
from . import on_torch
from .layout import ALIGN, BiasPlan, Block, part, sizes, unflatten


def bias_plan(index: Sequence[Tensor], blocks: Sequence[int], heads: Sequence[int], rows: Sequence[int],
              coords: Sequence[Tensor] | None = None, hidden: int = 512) -> tuple[BiasPlan, tuple[Block, ...]]:
    """Plan of an encoder, on the CPU.

    Args:
        index: For each stage (N, N) int64, the table row of each pair.
        blocks, heads, rows: Of each stage: how many, heads of each, T.
        coords: For each stage (T, 2); None for tables.
        hidden: Width of the MLP.

    Raises:
        ValueError: An index is not square.
    """
    if any(i.ndim != 2 or i.shape[0] != i.shape[1] for i in index):
        raise ValueError(f"bias_plan: index must be (N, N) for each stage, got {[tuple(i.shape) for i in index]}")
    found: list[Block] = []
    orders, starts = [], []
    at = dict.fromkeys(("params", "coords", "pair", "start", "table", "bias"), 0)
    for stage, flat in enumerate(i.reshape(-1) for i in index):
        t, pairs = rows[stage], flat.numel()
        values, order = torch.sort(flat, stable=True)
        orders.append(order)
        starts.append(torch.searchsorted(values, torch.arange(t + 1, device=flat.device)))
        for _ in range(blocks[stage]):
            found.append(Block(heads[stage], t, pairs, **at))
            at["params"] += heads[stage] * t if coords is None else hidden * (3 + heads[stage])
            at["table"] += heads[stage] * t
            at["bias"] += math.ceil(heads[stage] * pairs / ALIGN) * ALIGN
        at["coords"] += t
        at["pair"] += pairs
        at["start"] += t + 1
    table = torch.cat([c.float() for c in coords]) if coords else torch.empty(0, 2, device="cpu")
    plan = BiasPlan(torch.cat([i.reshape(-1) for i in index]), torch.cat(orders), torch.cat(starts), table,
                    torch.tensor(found, dtype=torch.int64, device="cpu"))
    return plan, tuple(found)


def position_bias(plan: BiasPlan, blocks: Sequence[Block], params: Sequence[tuple[Tensor, ...]], *,
                  impl: str = "auto") -> list[Tensor]:
    """Additive attention bias of every block, in one evaluation.

    SwinV2: ``16·sigmoid(relu(coords·W1ᵀ + b1)·W2ᵀ)`` looked up at the index; Swin: its table looked up.

    Args:
        plan, blocks: Of :func:`bias_plan`.
        params: (W1 (K, 2), b1 (K,), W2 (heads, K)) of each block, or (table (T, heads),).
        impl: See :mod:`fastmim_kernels.common.dispatch`.

    Returns:
        (heads, N, N) of each block, float32 (float64 for float64 parameters).

    Raises:
        ValueError: Shapes do not belong together.
    """
    hidden = params[0][1].numel() if len(params[0]) == 3 else 0
    shapes: list[tuple[int, ...]] = []
    for own, block in zip(params, blocks, strict=True):
        wanted = [(hidden, 2), (hidden,), (block.heads, hidden)] if hidden else [(block.rows, block.heads)]
        if [p.shape for p in own] != wanted:
            raise ValueError(f"position_bias: weight1, bias1, weight2 or the table must be {wanted}, got "
                             f"{[tuple(p.shape) for p in own]}")
        shapes += wanted
    given = [p for own in params for p in own]
    layout = [value for block in blocks for value in block]
    bias = _OF_PARAMETERS(impl, _How(plan, layout, hidden, shapes), *given)
    if bias is None:
        bias = OP(_flat(given), *plan, layout, hidden, impl=impl)
    ends = [block.bias for block in blocks[1:]] + [bias.numel()]
    parts = bias.split([end - block.bias for block, end in zip(blocks, ends, strict=True)])
    return [exactly(p, (b.heads, math.isqrt(b.pairs), math.isqrt(b.pairs))) for p, b in zip(parts, blocks, strict=True)]


def cpb_bias(coords: Tensor, index: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, *,
             impl: str = "auto") -> Tensor:
    """:func:`position_bias` of one SwinV2 stage by itself, which makes its plan at every call.

    Args:
        coords: (T, 2) log-spaced relative coordinates, T = (2·wh − 1)(2·ww − 1).
        index: (N, N) int64 row of ``coords`` of each query/key pair.
        weight1: (L, K, 2) and bias1: (L, K), first layer of each block's MLP.
        weight2: (L, heads, K), second layer.

    Returns:
        (L, heads, N, N).
    """
    plan, blocks = bias_plan([index], [len(weight1)], [weight2.shape[1]], [len(coords)], [coords], bias1.shape[-1])
    plan = BiasPlan(*(tensor.to(index.device) for tensor in plan))
    params = list(zip(weight1.unbind(0), bias1.unbind(0), weight2.unbind(0), strict=True))
    return torch.stack(position_bias(plan, blocks, params, impl=impl))


def traffic(blocks: int, heads: int, rows: int, pairs: int, hidden: int = 512
            ) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Least (bytes read, bytes written, FLOPs) of forward and of backward of one stage, all in float32.

    Args:
        blocks: L; ``heads`` of each; ``rows`` T of the coordinate table; ``pairs`` N² entries of a bias.
        hidden: K; 0 for tables. The backward pass evaluates the first layer again instead of keeping it.
    """
    table, bias = blocks * heads * rows * 4, blocks * heads * pairs * 4
    if not hidden:
        return (table + pairs * 8, bias, 0), (bias + pairs * 8, table, 0)
    params = blocks * hidden * (3 + heads) * 4
    first, second = 2 * blocks * rows * hidden * 2, 2 * blocks * rows * hidden * heads
    forward = (params + rows * 8 + pairs * 8, table + bias, first + second)
    return forward, (params + rows * 8 + pairs * 8 + table + bias, params, 2 * first + 2 * second)


def _fake(params: Tensor, index: Tensor, order: Tensor, start: Tensor, coords: Tensor, table: Tensor,
          layout: Sequence[int], hidden: int, impl: str) -> tuple[Tensor, Tensor]:
    """(the biases, the (heads, T) tables over 16 of each block; empty without an MLP)."""
    biases, tables = sizes(unflatten(layout), hidden)
    return params.new_empty(biases), params.new_empty(tables)


def _backward_fake(grad: Tensor, sigmoids: Tensor, params: Tensor, index: Tensor, order: Tensor, start: Tensor,
                   coords: Tensor, table: Tensor, layout: Sequence[int], hidden: int, impl: str) -> Tensor:
    """Gradient of ``params``."""
    return torch.empty_like(params)


def _save(inputs: Any, outputs: Any) -> Any:
    return (outputs[1], *inputs[:6]), inputs[6:]


def _gradients(backward: Callable, kept: Kept, grad: Tensor) -> tuple[Tensor]:
    return (backward(grad, *kept.tensors, *kept.settings),)


def _flops(params: Any, index: Any, order: Any, start: Any, coords: Any, table: Any, layout: Sequence[int],
           hidden: int, *_: Any) -> int:
    return sum(traffic(1, b.heads, b.rows, b.pairs, hidden)[0][2] for b in unflatten(layout))


def _backward_flops(grad: Any, sigmoids: Any, params: Any, index: Any, order: Any, start: Any, coords: Any, table: Any,
                    layout: Sequence[int], hidden: int, *_: Any) -> int:
    return sum(traffic(1, b.heads, b.rows, b.pairs, hidden)[1][2] for b in unflatten(layout))


def _reference(params: Tensor, index: Tensor, order: Tensor, start: Tensor, coords: Tensor, table: Tensor,
               layout: Sequence[int], hidden: int) -> Tensor:
    """The biases as the op gives them: flat, with gaps up to the next multiple of :data:`.layout.ALIGN`."""
    blocks = unflatten(layout)
    found = []
    for block, end in zip(blocks, [b.bias for b in blocks[1:]] + [sizes(blocks, hidden)[0]], strict=True):
        n = math.isqrt(block.pairs)
        rows = index[block.pair : block.pair + block.pairs].view(n, n)
        if hidden:
            inputs = coords[block.coords : block.coords + block.rows].to(params.dtype)
            second = block.params + 3 * hidden
            weight1, weight2 = part(params, block.params, hidden, 2), part(params, second, block.heads, hidden)
            bias = reference.cpb_bias(inputs, rows, weight1[None], params[None, second - hidden : second],
                                      weight2[None])[0]
        else:
            bias = part(params, block.params, block.rows, block.heads).mT[:, rows]
        found += [bias.flatten(), bias.new_zeros(end - block.bias - bias.numel())]
    return torch.cat(found)


OP = define_op("position_bias", on_torch, ".on_triton", reference=_reference, fake=_fake, backward_fake=_backward_fake,
               save=_save, gradients=_gradients, flops=_flops, backward_flops=_backward_flops)


class _How(NamedTuple):
    plan: BiasPlan
    layout: list[int]
    hidden: int
    shapes: list[tuple[int, ...]]
    """Of the parameters."""


def _flat(params: Sequence[Tensor]) -> Tensor:
    return torch.cat([p.reshape(-1) for p in params]).to(statistics_dtype(params[0].dtype))


def _of_parameters(way: Forward, how: _How, *params: Tensor) -> Tensor:
    """The op with what makes its input, which as nodes of their own would be two and two views for each parameter."""
    bias: Tensor = way.run(OP, _flat(params), *how.plan, how.layout, how.hidden)
    return bias


def _of_parameters_gradients(way: Backward, how: _How, needs: tuple[bool, ...], grad: Tensor) -> list[Tensor]:
    flat: Any = way.run(grad)[0]
    parts = flat.split([math.prod(shape) for shape in how.shapes])
    return [part.view(shape) for part, shape in zip(parts, how.shapes, strict=True)]


_OF_PARAMETERS = define_chain("position_bias_of_parameters", _of_parameters, _of_parameters_gradients)
