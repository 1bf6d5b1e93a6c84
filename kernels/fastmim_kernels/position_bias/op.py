"""Position bias of all blocks of an encoder at once: SwinV2's continuous one (section 3.3) and Swin's tables.

One evaluation a step for every stage together: stages have different windows and heads, so the op works on flat
tensors, and a :class:`BiasPlan`, made once for a model, says where each block's part of them lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..common.arguments import check_devices, explained, floating, whole, within, wrong
from ..common.chain import Backward, Forward, define_chain
from ..common.define_op import Kept, define_op
from ..common.rows import exactly, statistics_dtype
from . import on_torch
from .layout import ALIGN, BiasPlan, Block, part, sizes, unflatten


@explained(index="index")
def bias_plan(index: Sequence[Tensor], blocks: Sequence[int], heads: Sequence[int], rows: Sequence[int],
              coords: Sequence[Tensor] | None = None, hidden: int = 512) -> tuple[BiasPlan, tuple[Block, ...]]:
    """Plan of an encoder, on the CPU.

    Args:
        index: For each stage (N, N) int64, the table row of each pair, 0 to T − 1.
        blocks, heads, rows: Of each stage: how many, heads of each, T.
        coords: For each stage (T, 2); None for tables.
        hidden: Width of the MLP.

    Raises:
        ValueError: An argument is not what is said here.
    """
    blocks, heads, rows = ([whole(v) for v in values] for values in (blocks, heads, rows))
    hidden = whole(hidden)
    _check_plan(index, blocks, heads, rows, coords, hidden)
    return plan_of(index, blocks, heads, rows, coords, hidden)


def plan_of(index: Sequence[Tensor], blocks: Sequence[int], heads: Sequence[int], rows: Sequence[int],
            coords: Sequence[Tensor] | None = None, hidden: int = 512) -> tuple[BiasPlan, tuple[Block, ...]]:
    """:func:`bias_plan` of arguments that are right, but for the values of ``index``, which may be still to come."""
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


@explained()
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
        ValueError: An argument is not what is said here.
    """
    hidden = _check(plan, blocks, params)
    given = [p for own in params for p in own]
    layout = [value for block in blocks for value in block]
    found = _OF_PARAMETERS(impl, _How(plan, blocks, layout, hidden, tuple([p.shape for p in given])), *given)
    return _apart(OP(_flat(given), *plan, layout, hidden, impl=impl), blocks) if found is None else list(found)


@explained(index="index")
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

    Raises:
        ValueError: An argument is not what is said here.
    """
    op = "cpb_bias"
    floating(op, coords, weight1, bias1, weight2)
    if weight1.ndim != 3 or weight1.shape[2] != 2 or not weight1.numel():
        raise wrong(op, "weight1", "(L, K, 2)", weight1)
    if bias1.shape != weight1.shape[:2]:
        raise wrong(op, "bias1", f"{tuple(weight1.shape[:2])} for weight1 of {tuple(weight1.shape)}", bias1)
    if weight2.ndim != 3 or (weight2.shape[0], weight2.shape[2]) != bias1.shape or not weight2.shape[1]:
        raise wrong(op, "weight2", f"({bias1.shape[0]}, heads, {bias1.shape[1]}) for bias1 of {tuple(bias1.shape)}",
                    weight2)
    if coords.ndim != 2:
        raise wrong(op, "coords", "(T, 2)", coords)
    _check_stage(op, index, len(coords), coords)
    plan, blocks = plan_of([index], [len(weight1)], [weight2.shape[1]], [len(coords)], [coords], bias1.shape[-1])
    plan = BiasPlan(*(tensor.to(index.device) for tensor in plan))
    params = list(zip(weight1.unbind(0), bias1.unbind(0), weight2.unbind(0), strict=True))
    return torch.stack(position_bias(plan, blocks, params, impl=impl))


def _check_plan(index: Sequence[Tensor], blocks: Sequence[int], heads: Sequence[int], rows: Sequence[int],
                coords: Sequence[Tensor] | None, hidden: int) -> None:
    op, stages = "bias_plan", len(index)
    if not stages:
        raise wrong(op, "index", "a tensor for each stage, of which there is one at least", index)
    for name, values in (("blocks", blocks), ("heads", heads), ("rows", rows)):
        if len(values) != stages or any(not isinstance(v, int) or v < 1 for v in values):
            raise wrong(op, name, f"{stages} numbers of 1 or more, one a stage of index", values)
    if coords is not None and len(coords) != stages:
        raise wrong(op, "coords", f"{stages} tensors, one a stage of index; or None for tables", coords)
    if coords is not None and (not isinstance(hidden, int) or hidden < 1):
        raise wrong(op, "hidden", "1 or more", hidden)
    check_devices(op, [*index, *(coords or ())])
    for stage, (own, t) in enumerate(zip(index, rows, strict=True)):
        _check_stage(op, own, t, None if coords is None else coords[stage])


def _check_stage(op: str, index: Tensor, rows: int, coords: Tensor | None) -> None:
    if index.ndim != 2 or index.shape[0] != index.shape[1] or not index.numel() or index.dtype != torch.int64:
        raise wrong(op, "index", "(N, N) of int64 for each stage", index)
    if coords is not None:
        floating(op, coords)
        if coords.shape != (rows, 2):
            raise wrong(op, "coords", f"({rows}, 2) for each stage, a row for each of the table", coords)
    within(op, "index", index, 0, rows - 1, "rows of the table" if coords is None else "rows of coords")


def _check(plan: BiasPlan, blocks: Sequence[Block], params: Sequence[tuple[Tensor, ...]]) -> int:
    """Width of the MLP, 0 for tables."""
    op = "position_bias"
    if not blocks or len(plan.layout) != len(blocks):
        raise wrong(op, "blocks", f"the {len(plan.layout)} that bias_plan returned with plan", blocks)
    if len(params) != len(blocks):
        raise wrong(op, "params", f"{len(blocks)} tuples of tensors, one a block", params)
    hidden = params[0][1].numel() if len(params[0]) == 3 else 0
    for own, block in zip(params, blocks, strict=True):
        floating(op, *own)
        wanted = [(hidden, 2), (hidden,), (block.heads, hidden)] if hidden else [(block.rows, block.heads)]
        if [p.shape for p in own] != wanted:
            raise wrong(op, "params", f"(weight1, bias1, weight2) or (table,) of {wanted} for each block", own)
    return hidden


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
    blocks: Sequence[Block]
    layout: list[int]
    hidden: int
    shapes: tuple[torch.Size, ...]
    """Of the parameters."""


def _flat(params: Sequence[Tensor]) -> Tensor:
    return torch._utils._flatten_dense_tensors(params).to(statistics_dtype(params[0].dtype))


def _gaps(blocks: Sequence[Block], values: int) -> list[int]:
    """Values of each bias with what follows it, of as many in all."""
    ends = [block.bias for block in blocks[1:]] + [values]
    return [end - block.bias for block, end in zip(blocks, ends, strict=True)]


def _apart(bias: Tensor, blocks: Sequence[Block]) -> list[Tensor]:
    """(heads, N, N) of each block, of the flat biases."""
    parts = bias.split(_gaps(blocks, bias.numel()))
    sides = [math.isqrt(block.pairs) for block in blocks]
    return [exactly(p, (b.heads, n, n)) for p, b, n in zip(parts, blocks, sides, strict=True)]


def _together(grads: Sequence[Tensor | None], blocks: Sequence[Block], hidden: int, like: Tensor) -> Tensor:
    """The reverse for their gradients; nothing reads what lies between two blocks."""
    found = []
    for grad, block, size in zip(grads, blocks, _gaps(blocks, sizes(blocks, hidden)[0]), strict=True):
        count = block.heads * block.pairs
        found.append(like.new_zeros(count) if grad is None else grad.reshape(-1))
        if size != count:
            found.append(like.new_zeros(size - count))
    return torch.cat(found)


def _of_parameters(way: Forward, how: _How, *params: Tensor) -> list[Tensor]:
    """The op with what makes its input and takes its result apart: else nodes of their own for each block."""
    return _apart(way.run(OP, _flat(params), *how.plan, how.layout, how.hidden), how.blocks)


def _of_parameters_gradients(way: Backward, how: _How, needs: tuple[bool, ...], *grads: Tensor | None) -> list[Tensor]:
    like = next(grad for grad in grads if grad is not None)
    flat: Any = way.run(_together(grads, how.blocks, how.hidden, like))[0]
    return list(torch._utils._unflatten_dense_tensors(flat, _shaped(how.shapes)))


@lru_cache(maxsize=16)
def _shaped(shapes: tuple[torch.Size, ...]) -> list[Tensor]:
    """Tensors without values that say how a flat one is taken apart, by one call of torch."""
    return [torch.empty(shape, device="meta") for shape in shapes]


_OF_PARAMETERS = define_chain("position_bias_of_parameters", _of_parameters, _of_parameters_gradients)
