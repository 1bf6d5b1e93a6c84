"""What the ops on rows share: LayerNorm of any mix of dtypes, sums over rows, the dtype of statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, but float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, which takes microseconds to find that there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def nothing(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor for a result that is not wanted, the same for all: ops of a step would make hundreds."""
    dtype = like.dtype if dtype is None else dtype
    # What a mode makes (a fake tensor) is of use within the mode alone.
    return torch.empty(0, dtype=dtype, device=like.device) if is_in_torch_dispatch_mode() else _kept(dtype, like.device)


@lru_cache(maxsize=64)
def _kept(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # autograd may have to keep it
        return torch.empty(0, dtype=dtype, device=device)


def exactly(padded: Tensor, shape: Sequence[int]) -> Tensor:
    """The first values of a flat tensor in ``shape``; all of them, as they mostly are, cost backward no copy."""
    count = math.prod(shape)
    return (padded if padded.numel() == count else padded[:count]).view(shape)


def column_sum(x: Tensor) -> Tensor:
    """(C,) sum over all but the last axis of x, accumulated in float32 or better.

    In bfloat16 on a CPU the result is rounded to that: a sum that asks for float32 is two to eight times slower.
    """
    x = x.reshape(-1, x.shape[-1])
    low = x.device.type == "cpu" and x.dtype == torch.bfloat16
    return x.sum(0, dtype=None if low else statistics_dtype(x.dtype))


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def shown_bits(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """(…, 1) integers as wide as ``dtype``: all bits of a row that the bool (…) ``hidden`` does not mark, else none.

    With them rows are chosen by bits: ``torch.where`` with a condition of a row takes three times as long on a CPU.
    """
    return hidden.to(_BITS[dtype.itemsize]).sub_(1).unsqueeze(-1)


def zero_rows(x: Tensor, shown: Tensor) -> Tensor:
    """A copy of (…, C) with exact zeros, whatever x holds there, in the rows that :func:`shown_bits` hides."""
    return x.view(shown.dtype).bitwise_and(shown).view(x.dtype)


def zero_rows_(x: Tensor, shown: Tensor) -> Tensor:
    """:func:`zero_rows` in x itself."""
    x.view(shown.dtype).bitwise_and_(shown)
    return x


def replaced_rows(x: Tensor, shown: Tensor, value: Tensor) -> Tensor:
    """A copy of (…, C) with the (C,) ``value`` of the same dtype in the rows that ``shown`` hides, bit for bit."""
    bits, value = shown.dtype, value.view(shown.dtype)
    return x.view(bits).bitwise_xor(value).bitwise_and_(shown).bitwise_xor_(value).view(x.dtype)


def numbers_of(marked: Tensor) -> Tensor:
    """Row numbers, in order, that a bool (…) marks; their count is data, for which a host waits on other devices."""
    return marked.reshape(-1).nonzero().view(-1)


def sum_of_rows(x: Tensor, rows: Tensor) -> Tensor:
    """(C,) sum of the ``rows`` of (…, C), by number, in :func:`statistics_dtype`, on a CPU.

    64 at a time, of few float32 rows all at once. Sums of 64 bfloat16 rows are rounded to that, by less together than
    a sum that is rounded once; they take half the time of a sum that asks for float32. Those of float16 might overflow.
    """
    wide, flat = statistics_dtype(x.dtype), x.view(-1, x.shape[-1])
    if x.dtype == torch.float16:
        return flat.index_select(0, rows).sum(0, dtype=wide)
    if x.dtype == wide and 0 < len(rows) <= 256:
        return torch.embedding_bag(flat, rows, rows.new_zeros(1), mode=0)[0].squeeze(0)
    return torch.embedding_bag(flat, rows, torch.arange(0, len(rows), 64), mode=0)[0].sum(0, dtype=wide)


def marked_sum(x: Tensor, marked: Tensor) -> Tensor:
    """(C,) sum of the rows of contiguous (…, C) that the bool (…) ``marked`` marks, in :func:`statistics_dtype`."""
    if x.is_cpu:
        return sum_of_rows(x, numbers_of(marked))
    zero = torch.where(marked.unsqueeze(-1), x, 0)
    return zero.flatten(0, -2).sum(0, dtype=statistics_dtype(x.dtype))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(LN(x), mean (rows,), rstd (rows,)) of (…, C); the statistics in :func:`statistics_dtype`.

    A CPU takes low-precision x with float32 parameters, one pass less; elsewhere x is widened.
    """
    wide = statistics_dtype(x.dtype)
    x = x if x.device.type == "cpu" else x.to(wide)
    y, mean, rstd = torch.native_layer_norm(x, weight.shape, cast(weight, wide), cast(bias, wide), eps)
    return y, mean.flatten(), rstd.flatten()


def layer_norm_backward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
                        ) -> tuple[Tensor, Tensor, Tensor]:
    """(d x in the dtype of x, d weight and d bias (C,) in :func:`statistics_dtype`) of :func:`layer_norm`.

    Low precision is widened first: the mixed CPU kernel of torch adds the gradients of the parameters up in
    bfloat16, which is wrong by a tenth and more after some thousand rows.
    """
    wide = statistics_dtype(x.dtype)
    weight, shape = cast(weight, wide), (*x.shape[:-1], 1)
    dx, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
        cast(grad, wide), cast(x, wide), weight.shape, mean.view(shape), rstd.view(shape), weight, weight,
        [True, True, True])
    return cast(dx, x.dtype), d_weight, d_bias
