"""Position bias of all blocks of an encoder at once: SwinV2's continuous one (section 3.3) and Swin's tables.

One evaluation a step for every stage together: stages have different windows and heads, so the op works on flat
tensors, and a :class:`BiasPlan`, made once for a model, says where each block's part of them lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from ..common.define_op import outside_autocast
from ..common.dispatch import resolve
from ..common.rows import exactly, statistics_dtype

ALIGN = 16
"""Values: a bias starts at a multiple of it, so that kernels read 128 bits at a time."""


class Block(NamedTuple):
    """Where a block's parts lie: sizes, then offsets into flat tensors."""

    heads: int
    rows: int
    """T of the bias table."""
    pairs: int
    """N² of the bias."""
    params: int
    coords: int
    pair: int
    start: int
    table: int
    bias: int


class BiasPlan(NamedTuple):
    """What :func:`position_bias` knows of the blocks; the tensors are buffers of the model."""

    rows: Tensor
    """(Σ N²,) int64: table row of each query/key pair, stage after stage."""
    order: Tensor
    """(Σ N²,) int64: the pairs of a stage sorted by table row."""
    start: Tensor
    """(Σ (T + 1),) int64: first pair of each row in that order."""
    coords: Tensor
    """(Σ T, 2) float32: log-spaced relative coordinates; empty for tables."""
    layout: Tensor
    """(blocks, 9) int64: :class:`Block` of each, for the kernels."""


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
    for own, block in zip(params, blocks, strict=True):
        wanted = [(hidden, 2), (hidden,), (block.heads, hidden)] if hidden else [(block.rows, block.heads)]
        if [tuple(p.shape) for p in own] != wanted:
            raise ValueError(f"position_bias: weight1, bias1, weight2 or the table must be {wanted}, got "
                             f"{[tuple(p.shape) for p in own]}")
    given = [p for own in params for p in own]
    device, wide = given[0].device, statistics_dtype(given[0].dtype)
    function = resolve("cpb_bias", impl, _FLOAT64 if wide == torch.float64 else _IMPLEMENTATIONS, device)
    # The MLP is tiny and its output decides logits of magnitude 16: always full precision.
    with torch.autocast(device.type, enabled=False):
        return function(plan, blocks, torch.cat([p.reshape(-1) for p in given]).to(wide), hidden)


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


def _unflatten(layout: Sequence[int]) -> list[Block]:
    size = len(Block._fields)
    return [Block(*layout[i : i + size]) for i in range(0, len(layout), size)]


def _total(blocks: Sequence[Block]) -> int:
    last = blocks[-1]
    return last.bias + math.ceil(last.heads * last.pairs / ALIGN) * ALIGN


@torch.library.custom_op("fastmim::position_bias", mutates_args=())
def _op(params: Tensor, index: Tensor, order: Tensor, start: Tensor, coords: Tensor, table: Tensor,
        layout: Sequence[int], hidden: int, impl: str) -> tuple[Tensor, Tensor]:
    """(the biases, the (heads, T) tables over 16 of each block; empty without an MLP)."""
    blocks = _unflatten(layout)
    if impl == "triton":
        from . import on_triton as kernels
        return kernels.forward(params, index, coords, table, blocks, _total(blocks), hidden)
    bias = params.new_empty(_total(blocks))
    sigmoids = params.new_empty(blocks[-1].table + blocks[-1].heads * blocks[-1].rows if hidden else 0)
    for block in blocks:
        at = index[block.pair : block.pair + block.pairs]
        if hidden:
            values = _part(sigmoids, block.table, block.heads, block.rows)
            first, weight2 = _hidden(params, coords, block, hidden)
            torch.sigmoid(weight2 @ first.mT, out=values)
        else:
            values = _part(params, block.params, block.rows, block.heads).mT
        found = _part(bias, block.bias, block.heads, block.pairs)
        torch.index_select(values, 1, at, out=found)
        if hidden:
            found.mul_(16)
    return bias, sigmoids


@_op.register_fake
def _(params: Tensor, index: Tensor, order: Tensor, start: Tensor, coords: Tensor, table: Tensor,
      layout: Sequence[int], hidden: int, impl: str) -> tuple[Tensor, Tensor]:
    blocks = _unflatten(layout)
    sigmoids = blocks[-1].table + blocks[-1].heads * blocks[-1].rows if hidden else 0
    return params.new_empty(_total(blocks)), params.new_empty(sigmoids)


@torch.library.custom_op("fastmim::position_bias_backward", mutates_args=())
def _backward_op(grad: Tensor, sigmoids: Tensor, params: Tensor, index: Tensor, order: Tensor, start: Tensor,
                 coords: Tensor, table: Tensor, layout: Sequence[int], hidden: int, impl: str) -> Tensor:
    """Gradient of ``params``."""
    blocks, grad = _unflatten(layout), grad.contiguous()
    if impl == "triton":
        from . import on_triton as kernels
        return kernels.backward(grad, sigmoids, params, order, start, coords, table, blocks, hidden)
    found = torch.empty_like(params)
    for block in blocks:
        lines = _part(grad, block.bias, block.heads, block.pairs)
        sums = _scatter(lines, index[block.pair : block.pair + block.pairs], order, start, block)
        if not hidden:
            _part(found, block.params, block.rows, block.heads).copy_(sums.mT)
            continue
        values = _part(sigmoids, block.table, block.heads, block.rows)
        sums.mul_(values).mul_(1 - values).mul_(16)
        first, weight2 = _hidden(params, coords, block, hidden)
        d_first = torch.ops.aten.threshold_backward(sums.mT @ weight2, first, 0)
        # Products instead of sums over the rows: one pass over d_first gives both.
        inputs = coords[block.coords : block.coords + block.rows].to(params.dtype)
        both = d_first.mT @ torch.cat((inputs, inputs.new_ones(len(inputs), 1)), 1)
        _part(found, block.params, hidden, 2).copy_(both[:, :2])
        _part(found, block.params + 2 * hidden, 1, hidden).copy_(both[:, 2])
        torch.mm(sums, first, out=_part(found, block.params + 3 * hidden, block.heads, hidden))
    return found


@_backward_op.register_fake
def _(grad: Tensor, sigmoids: Tensor, params: Tensor, index: Tensor, order: Tensor, start: Tensor, coords: Tensor,
      table: Tensor, layout: Sequence[int], hidden: int, impl: str) -> Tensor:
    return torch.empty_like(params)


def _part(flat: Tensor, start: int, rows: int, columns: int) -> Tensor:
    return flat[start : start + rows * columns].view(rows, columns)


def _hidden(params: Tensor, coords: Tensor, block: Block, hidden: int) -> tuple[Tensor, Tensor]:
    """(T, K) activation of the first layer, and W2. One block at a time: its 1 MB stays in a CPU's cache."""
    inputs = coords[block.coords : block.coords + block.rows].to(params.dtype)
    bias1 = params[block.params + 2 * hidden : block.params + 3 * hidden]
    first = torch.addmm(bias1, inputs, _part(params, block.params, hidden, 2).mT).relu_()
    return first, _part(params, block.params + 3 * hidden, block.heads, hidden)


def _scatter(grad: Tensor, index: Tensor, order: Tensor, start: Tensor, block: Block) -> Tensor:
    """(heads, N²) summed into (heads, T) in a fixed order."""
    if grad.device.type == "cpu":  # one thread a line, in order
        return grad.new_zeros(len(grad), block.rows).scatter_add_(1, index.expand_as(grad), grad)
    lines = grad.mT.index_select(0, order[block.pair : block.pair + block.pairs])
    lengths = start[block.start : block.start + block.rows + 1].diff()
    return torch.segment_reduce(lines, "sum", lengths=lengths, axis=0).mT.contiguous()


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *inputs[:6])
    ctx.settings = inputs[6:]


@outside_autocast
def _autograd(ctx, grad, _sigmoids):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 9
    return _backward_op(grad, *ctx.saved_tensors, *ctx.settings), *[None] * 8


torch.library.register_autograd("fastmim::position_bias", _autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.fastmim.position_bias)
def _flops(params, index, order, start, coords, table, layout, hidden, *args, **kwargs  # type: ignore[no-untyped-def]
           ) -> int:
    return sum(traffic(1, b.heads, b.rows, b.pairs, hidden)[0][2] for b in _unflatten(layout))


@register_flop_formula(torch.ops.fastmim.position_bias_backward)
def _backward_flops(grad, sigmoids, params, index, order, start, coords, table, layout,  # type: ignore[no-untyped-def]
                    hidden, *args, **kwargs) -> int:
    return sum(traffic(1, b.heads, b.rows, b.pairs, hidden)[1][2] for b in _unflatten(layout))


def _run(plan: BiasPlan, blocks: Sequence[Block], params: Tensor, hidden: int, impl: str) -> list[Tensor]:
    bias = _op(params, *plan, [value for block in blocks for value in block], hidden, impl)[0]
    ends = [block.bias for block in blocks[1:]] + [bias.numel()]
    parts = bias.split([end - block.bias for block, end in zip(blocks, ends, strict=True)])
    return [exactly(part, (b.heads, math.isqrt(b.pairs), math.isqrt(b.pairs)))
            for part, b in zip(parts, blocks, strict=True)]


def _reference(plan: BiasPlan, blocks: Sequence[Block], params: Tensor, hidden: int) -> list[Tensor]:
    found = []
    for block in blocks:
        n = math.isqrt(block.pairs)
        index = plan.rows[block.pair : block.pair + block.pairs].view(n, n)
        if hidden:
            coords = plan.coords[block.coords : block.coords + block.rows].to(params.dtype)
            end = block.params + 3 * hidden
            weight1 = _part(params, block.params, hidden, 2)
            bias1, weight2 = params[end - hidden : end], _part(params, end, block.heads, hidden)
            found.append(reference.cpb_bias(coords, index, weight1[None], bias1[None], weight2[None])[0])
        else:
            found.append(_part(params, block.params, block.rows, block.heads).mT[:, index])
    return found


_FLOAT64: dict[str, Callable] = {"torch": partial(_run, impl="torch"), "reference": _reference}
_IMPLEMENTATIONS: dict[str, Callable] = {**_FLOAT64, "triton": partial(_run, impl="triton")}
