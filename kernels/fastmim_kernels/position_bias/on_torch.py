"""``position_bias`` in torch: the path of CPUs, and of devices without Triton. A block at a time stays in cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import Block, part, sizes, unflatten


def forward(params: Tensor, index: Tensor, order: Tensor, start: Tensor, coords: Tensor, table: Tensor,
            layout: Sequence[int], hidden: int) -> tuple[Tensor, Tensor]:
    """Arguments and results of the op ``fastmim::position_bias``."""
    blocks = unflatten(layout)
    bias, sigmoids = (params.new_empty(size) for size in sizes(blocks, hidden))
    for block in blocks:
        at = index[block.pair : block.pair + block.pairs]
        if hidden:
            values = part(sigmoids, block.table, block.heads, block.rows)
            first, weight2 = _hidden(params, coords, block, hidden)
            torch.sigmoid(weight2 @ first.mT, out=values)
        else:
            values = part(params, block.params, block.rows, block.heads).mT
        found = part(bias, block.bias, block.heads, block.pairs)
        torch.index_select(values, 1, at, out=found)
        if hidden:
            found.mul_(16)
    return bias, sigmoids


def backward(grad: Tensor, sigmoids: Tensor, params: Tensor, index: Tensor, order: Tensor, start: Tensor,
             coords: Tensor, table: Tensor, layout: Sequence[int], hidden: int) -> Tensor:
    """Arguments and result of the op ``fastmim::position_bias_backward``."""
    blocks, grad = unflatten(layout), grad.contiguous()
    found = torch.empty_like(params)
    for block in blocks:
        lines = part(grad, block.bias, block.heads, block.pairs)
        sums = _scatter(lines, index[block.pair : block.pair + block.pairs], order, start, block)
        if not hidden:
            part(found, block.params, block.rows, block.heads).copy_(sums.mT)
            continue
        values = part(sigmoids, block.table, block.heads, block.rows)
        sums.mul_(values).mul_(1 - values).mul_(16)
        first, weight2 = _hidden(params, coords, block, hidden)
        d_first = torch.ops.aten.threshold_backward(sums.mT @ weight2, first, 0)
        # Products instead of sums over the rows: one pass over d_first gives both.
        inputs = coords[block.coords : block.coords + block.rows].to(params.dtype)
        both = d_first.mT @ torch.cat((inputs, inputs.new_ones(len(inputs), 1)), 1)
        part(found, block.params, hidden, 2).copy_(both[:, :2])
        part(found, block.params + 2 * hidden, 1, hidden).copy_(both[:, 2])
        torch.mm(sums, first, out=part(found, block.params + 3 * hidden, block.heads, hidden))
    return found


def _hidden(params: Tensor, coords: Tensor, block: Block, hidden: int) -> tuple[Tensor, Tensor]:
    """(T, K) activation of the first layer, and W2. One block at a time: its 1 MB stays in a CPU's cache."""
    inputs = coords[block.coords : block.coords + block.rows].to(params.dtype)
    bias1 = params[block.params + 2 * hidden : block.params + 3 * hidden]
    first = torch.addmm(bias1, inputs, part(params, block.params, hidden, 2).mT).relu_()
    return first, part(params, block.params + 3 * hidden, block.heads, hidden)


def _scatter(grad: Tensor, index: Tensor, order: Tensor, start: Tensor, block: Block) -> Tensor:
    """(heads, N²) summed into (heads, T) in a fixed order."""
    if grad.device.type == "cpu":  # one thread a line, in order
        return grad.new_zeros(len(grad), block.rows).scatter_add_(1, index.expand_as(grad), grad)
    lines = grad.mT.index_select(0, order[block.pair : block.pair + block.pairs])
    lengths = start[block.start : block.start + block.rows + 1].diff()
    return torch.segment_reduce(lines, "sum", lengths=lengths, axis=0).mT.contiguous()
