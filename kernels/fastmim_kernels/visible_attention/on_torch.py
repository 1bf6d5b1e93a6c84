"""``visible_attention`` in torch: windows of about as many tokens together, as wide as the fullest of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..common.rows import statistics_dtype
from ..window_attention.on_torch import (
    CHUNK_CPU,
    CHUNK_GPU,
    NEGLIGIBLE,
    factors_of_logits,
    fitted,
    normalise_backward,
    product_dtype,
)

HIDDEN = -1e30
"""Added to the logits of keys that are not there; finite, so that a row without any key has no NaN."""
LEVELS = 6
"""Widths of windows that a CPU tells apart. Their number of logits is then at most 1 + 2/LEVELS of the least."""


class _Part(NamedTuple):
    """M windows of K places."""

    rows: Tensor
    """(M, K) which of all B·T tokens stands there; B·T for none."""
    nobody: Tensor | None
    """(M, K) bool: no token; None where all places are taken."""
    padded: Tensor | None
    """(M, K) bool: a key by padding."""
    pairs: Tensor | None
    """(M·K²,) entries of the (N, N) bias; None: K = N, in order."""
    mask: Tensor | None
    """(M, 1 or K, K) added to the logits."""
    shifted: bool


def forward(qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, padding: Tensor | None, slots: Tensor,
            places: Tensor, groups: Tensor | None, num_heads: int) -> tuple[Tensor, Tensor]:
    """Arguments and results of the op ``fastmim::visible_attention``; the second is empty."""
    batch, tokens, c3 = qkv.shape
    narrow = product_dtype(qkv)
    # The last row takes what was computed for nobody.
    out = qkv.new_empty(batch * tokens + 1, num_heads, c3 // 3 // num_heads)
    for part in _parts(slots, places, tokens, groups, padding is not None, num_heads):
        x = _take(qkv, part, 3 * num_heads, padding).to(narrow)
        wide, alpha, _ = factors_of_logits(x[: 2 * num_heads].to(statistics_dtype(x.dtype)), logit_scale)
        p = _weights(wide, part, bias, alpha)
        found = torch.bmm(p.to(narrow), x[2 * num_heads :].flatten(0, 2)).view(num_heads, -1, out.shape[-1])
        out.index_copy_(0, part.rows.flatten(), found.to(out.dtype).transpose(0, 1).contiguous())
    return out[:-1].view(batch, tokens, c3 // 3), qkv.new_empty(0, dtype=torch.float32)


def backward(grad: Tensor, qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, padding: Tensor | None, slots: Tensor,
             places: Tensor, groups: Tensor | None, out: Tensor | None, lse: Tensor, num_heads: int
             ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results of ``fastmim::visible_attention_backward``; ``out`` and ``lse`` are not read."""
    batch, tokens, c3 = qkv.shape
    narrow, grad = product_dtype(qkv), grad.contiguous()
    dqkv = qkv.new_empty(batch * tokens + 1, 3 * num_heads, c3 // 3 // num_heads)
    dbias = bias.new_zeros(bias.shape, dtype=torch.promote_types(bias.dtype, torch.float32))
    dscale, dpadding = (dbias.new_zeros(0 if t is None else t.shape) for t in (logit_scale, padding))
    for part in _parts(slots, places, tokens, groups, padding is not None, num_heads):
        x = _take(qkv, part, 3 * num_heads, padding).to(narrow)
        do = _take(grad, part, num_heads, None).to(narrow)
        if part.nobody is not None:
            do.masked_fill_(part.nobody[None, :, None, :, None], 0)
        wide, alpha, factor = factors_of_logits(x[: 2 * num_heads].to(statistics_dtype(x.dtype)), logit_scale)
        dx, ds = _part_backward(x, do, wide, _weights(wide, part, bias, alpha), alpha, logit_scale is not None)
        _add_to_bias(dbias, ds, part)
        one = normalise_backward(dx[: 2 * num_heads], wide, factor, logit_scale)
        if one is not None:
            dscale += one
        if part.padded is not None:
            dpadding += (dx * part.padded[None, :, None, :, None]).sum((1, 2, 3), dtype=dbias.dtype).flatten()
        dqkv.index_copy_(0, part.rows.flatten(), dx.to(qkv.dtype).flatten(1, 3).transpose(0, 1).contiguous())
    return dqkv[:-1].view(qkv.shape), dbias, dscale, dpadding


def _part_backward(x: Tensor, do: Tensor, wide: Tensor, p: Tensor, alpha: float, cosine: bool
                   ) -> tuple[Tensor, Tensor]:
    """Gradients of [Q, K, V], with cosine of the normalised [Q, K], and of the logits."""
    heads = len(do)
    q, k = (wide.to(x.dtype) if cosine else x[: 2 * heads]).chunk(2)
    dx = torch.empty_like(x)
    operands = [t.flatten(0, 2) for t in (do, q, k, x[2 * heads :])]
    found = [t.flatten(0, 2) for t in dx.chunk(3)]
    products = torch.empty_like(p)
    low = products if p.dtype == x.dtype else torch.empty_like(p, dtype=x.dtype)
    return dx, _products_backward(p, operands, found, alpha, products, low)


def _products_backward(p: Tensor, operands: list[Tensor], found: list[Tensor], alpha: float, products: Tensor,
                       low: Tensor) -> Tensor:
    """Fill ``found``, dq, dk and dv, from do, q, k and v (matrices, K, d); returns d logits in ``products``.

    ``products`` has the dtype of p, ``low`` that of the operands; they may be one.
    """
    (do, q, k, v), (dq, dk, dv) = operands, found
    torch.bmm(fitted(p, low).mT, do, out=dv)
    ds = fitted(torch.bmm(do, v.mT, out=low[: p.shape[0]]), products)
    torch.ops.aten._softmax_backward_data.out(ds, p, -1, ds.dtype, grad_input=ds)
    scaled = fitted(ds if alpha == 1 else torch.mul(ds, alpha, out=p), low)
    torch.bmm(scaled, k, out=dq)
    torch.bmm(scaled.mT, q, out=dk)
    return ds


def _take(x: Tensor, part: _Part, pieces: int, padding: Tensor | None) -> Tensor:
    """(B, T, pieces·d) → own copy (pieces, M, 1, K, d); of nobody, anybody's values, and of padded places their own."""
    rows, flat = part.rows, x.reshape(-1, x.shape[-1] // pieces)
    if part.nobody is not None:
        rows = rows.clamp(max=len(flat) // pieces - 1)
    piece = torch.arange(pieces, device=x.device)[:, None, None]
    found = flat.index_select(0, (rows * pieces + piece).flatten()).view(pieces, len(rows), 1, rows.shape[1], -1)
    if part.padded is None or padding is None:
        return found
    return torch.where(part.padded[None, :, None, :, None], padding.view(pieces, 1, 1, 1, -1), found)


def _weights(wide: Tensor, part: _Part, bias: Tensor, alpha: float) -> Tensor:
    """Attention weights (heads·M, K, K) of [Q, K] (2·heads, M, 1, K, d)."""
    (heads, m, _, width, _), (q, k) = wide.chunk(2)[0].shape, wide.chunk(2)
    shaped = wide.new_empty(heads, m, width, width)
    bias = bias.to(wide.dtype)
    if part.pairs is None:
        shaped.copy_(bias[:, None])
    else:
        torch.index_select(bias.flatten(1), 1, part.pairs, out=shaped.view(heads, -1))
    if part.mask is not None:
        shaped += part.mask
    logits = shaped.view(-1, width, width)
    torch.baddbmm(logits, q.flatten(0, 2), k.flatten(0, 2).mT, alpha=alpha, out=logits)
    p = torch.softmax(logits, -1, out=logits)
    # As in window attention: subnormal numbers are slow.
    return torch.threshold_(p, NEGLIGIBLE, 0) if part.shifted else p


def _add_to_bias(dbias: Tensor, ds: Tensor, part: _Part) -> None:
    """The sum over windows. A GPU would add atomically, in any order; sorted, its sum is the same each time."""
    heads = len(dbias)
    if part.pairs is None:
        dbias += ds.view(heads, -1, *dbias.shape[1:]).sum(1)
    elif _values_are_at_hand(ds):
        dbias.view(heads, -1).scatter_add_(1, part.pairs.expand(heads, -1), ds.view(heads, -1))
    else:
        sums = dbias.new_zeros(dbias[0].numel(), heads)
        sums.index_put_((part.pairs,), ds.view(heads, -1).mT, accumulate=True)
        dbias += sums.mT.view(dbias.shape)


def _parts(slots: Tensor, places: Tensor, tokens: int, groups: Tensor | None, padded: bool, heads: int
           ) -> Iterator[_Part]:
    """All windows that hold a token, in parts that stay in the cache."""
    batch, windows, n = slots.shape
    # Of which image and which of its windows each is.
    image = torch.arange(batch, device=slots.device)[:, None].expand(batch, windows).flatten()
    window = torch.arange(windows, device=slots.device).repeat(batch)
    slots, places = slots.reshape(-1, n), places.reshape(-1, n)
    for chosen, width in _widths(slots, tokens, padded):
        total = len(image) if chosen is None else len(chosen)
        step = max(1, (CHUNK_CPU if slots.is_cpu else CHUNK_GPU) // (heads * width**2))
        step = math.ceil(total / math.ceil(total / step))
        for start in range(0, total, step):
            own = slice(start, start + step) if chosen is None else chosen[start : start + step]
            kinds = None if groups is None else groups[window[own]]
            yield _part(slots[own], places[own], image[own] * tokens, kinds, batch * tokens, width, padded)


def _values_are_at_hand(x: Tensor) -> bool:
    """Elsewhere the host would wait for them."""
    return x.is_cpu


def _widths(slots: Tensor, tokens: int, padded: bool) -> Iterator[tuple[Tensor | None, int]]:
    """(numbers of windows or None for all, places of each that hold every token of each), of (M, N) slots.

    How full windows are is data, which a CPU may look at. Elsewhere all are as wide as any can be: a window holds no
    more tokens than its image, padded ones apart.
    """
    n = slots.shape[1]
    if not _values_are_at_hand(slots):
        yield None, n if padded else min(n, tokens)
        return
    held = (slots != -1).sum(1).masked_fill_((slots < 0).all(1), 0)
    level = (held * LEVELS + n - 1) // n
    order, counts = level.argsort(), torch.bincount(level, minlength=LEVELS + 1).tolist()
    for chosen in order.split(counts)[1:]:
        if len(chosen):
            yield chosen, int(held[chosen].max())


def _part(slots: Tensor, places: Tensor, first: Tensor, groups: Tensor | None, nowhere: int, width: int, padded: bool
          ) -> _Part:
    """Of windows (M, N) of images whose tokens begin at ``first`` (M,): their first places, or all in their order."""
    n, pairs = slots.shape[1], None
    if width < n:
        slots, places = slots[:, :width], places[:, :width]
        groups = None if groups is None else groups.gather(1, places)
        pairs = (places[:, :, None] * n + places[:, None]).flatten()
    else:
        slots = torch.empty_like(slots).scatter_(1, places, slots)
    nobody, free, mask = slots < 0, slots == -1, None
    rows = torch.where(nobody, nowhere, slots + first[:, None])
    if groups is not None:
        mask = (groups[:, :, None] != groups[:, None]).float().mul_(reference.MASKED_LOGIT)
    look = _values_are_at_hand(slots)
    if not look or free.any():
        hidden = free[:, None].float().mul_(HIDDEN)
        mask = hidden if mask is None else mask.add_(hidden)
    taken = look and not nobody.any()
    return _Part(rows, None if taken else nobody, slots == -2 if padded else None, pairs, mask, groups is not None)
