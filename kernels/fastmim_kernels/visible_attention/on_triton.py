"""``visible_attention`` by the kernels of window attention: every window as a map of its own, with more channels.

Those kernels know no missing keys. Channels behind those of a head, products of queries and keys like the others, give
their logits: 0 where a pair may attend, :data:`.reference.MASKED_LOGIT` between groups of the shift, far below that for
keys that are not there. Values have zeros there.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..common.rows import statistics_dtype
from ..window_attention import triton_backward, triton_forward
from ..window_attention.on_torch import factors_of_logits, normalise_backward

GROUPS, MORE = 4, 8
"""Groups that a shift makes at most, and channels behind those of a head: a multiple of 16 bytes in half precision."""
HIDDEN = -3e4
"""Logit of a key that is not there; within float16."""


def forward(qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, padding: Tensor | None, slots: Tensor,
            places: Tensor, groups: Tensor | None, num_heads: int) -> tuple[Tensor, Tensor]:
    """Arguments and results of the op ``fastmim::visible_attention``; the second is for backward."""
    batch, tokens, c3 = qkv.shape
    dense, home = _windows(qkv, logit_scale, padding, slots, places, groups, num_heads)
    out, lse = triton_forward.forward(dense, bias, None, num_heads, (1, slots.shape[2]), (0, 0))
    found = out.view(-1, num_heads, out.shape[-1] // num_heads)[..., : c3 // 3 // num_heads]
    return found.index_select(0, home).view(batch, tokens, c3 // 3), lse


def backward(grad: Tensor, qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, padding: Tensor | None, slots: Tensor,
             places: Tensor, groups: Tensor | None, out: Tensor, lse: Tensor, num_heads: int
             ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results of ``fastmim::visible_attention_backward``."""
    dense, home = _windows(qkv, logit_scale, padding, slots, places, groups, num_heads)
    rows = _rows(slots, places, qkv.shape[1], out.shape[0] * out.shape[1])
    do, o = (_dense(t.reshape(-1, num_heads, t.shape[-1] // num_heads), rows, len(home)) for t in (grad, out))
    window = (1, slots.shape[2])
    d_dense, dbias, _ = triton_backward.backward(do, dense, bias, None, o, lse, num_heads, window, (0, 0))
    d_dense = d_dense.view(len(rows), 3 * num_heads, -1)[..., : qkv.shape[-1] // 3 // num_heads]
    dpadding = dbias.new_empty(0)
    if padding is not None:
        padded = (rows == len(home))[:, None, None]
        total = (d_dense * padded).sum(0, keepdim=True, dtype=dbias.dtype)
        dpadding = _through_scale(total, padding[None].to(total.dtype), logit_scale, num_heads)[0].flatten()
    dqkv, dscale = _through_scale(d_dense.index_select(0, home), qkv, logit_scale, num_heads)
    return dqkv, dbias, dbias.new_empty(0) if dscale is None else dscale, dpadding


def _windows(qkv: Tensor, logit_scale: Tensor | None, padding: Tensor | None, slots: Tensor, places: Tensor,
             groups: Tensor | None, num_heads: int) -> tuple[Tensor, Tensor]:
    """((B·W, 1, N, 3·heads·(d + MORE)) windows, (B·T,) which of their places each token has)."""
    batch, tokens, c3 = qkv.shape
    nowhere = batch * tokens
    rows = _rows(slots, places, tokens, nowhere)
    at = torch.arange(len(rows), device=qkv.device)
    home = rows.new_empty(nowhere + 2).scatter_(0, rows, at)[:nowhere]
    x = qkv.reshape(nowhere, 3, num_heads, -1)
    scaled = _scaled(x if padding is None else torch.cat((x, padding.view(1, *x.shape[1:]))), logit_scale)
    dense = _dense(scaled.flatten(1, 2), rows, nowhere).view(*slots.shape, 3, num_heads, -1)
    more = dense[..., c3 // 3 // num_heads :]
    root = _root(c3 // 3 // num_heads)
    missing = torch.empty_like(slots).scatter_(2, places, slots) == -1
    more[..., 0, :, GROUPS] = root
    more[..., 1, :, GROUPS] = (missing * HIDDEN).to(qkv.dtype)[..., None]
    if groups is not None:
        own = groups[..., None] == torch.arange(GROUPS, device=groups.device)
        more[..., 0, :, :GROUPS] = (~own * (reference.MASKED_LOGIT * root)).to(qkv.dtype)[..., None, :]
        more[..., 1, :, :GROUPS] = own.to(qkv.dtype)[..., None, :]
    return dense.view(-1, 1, slots.shape[2], dense.shape[-1] * 3 * num_heads), home


def _rows(slots: Tensor, places: Tensor, tokens: int, nowhere: int) -> Tensor:
    """(B·W·N,) which of all B·T tokens each place of each window holds; behind them come padding and nobody."""
    first = torch.arange(len(slots), device=slots.device)[:, None, None] * tokens
    ordered = torch.where(slots < 0, nowhere + (slots == -1), slots + first)
    return torch.empty_like(ordered).scatter_(2, places, ordered).flatten()


def _dense(x: Tensor, rows: Tensor, nowhere: int) -> Tensor:
    """(R, heads, d) → (B·W·N, heads, d + MORE), zeros in what is not there."""
    # Two rows of zeros for padding and for nobody, of which x may have the first.
    wide = F.pad(x, (0, MORE, 0, 0, 0, nowhere + 2 - len(x)))
    return wide.index_select(0, rows)


def _scaled(x: Tensor, logit_scale: Tensor | None) -> Tensor:
    """(R, 3, heads, d), whose q·k divided by the root of d + MORE are the logits."""
    factor, q, kv = _root(x.shape[-1]), x[:, :1], x[:, 1:]
    if logit_scale is None:
        return torch.cat((q * (factor * x.shape[-1] ** -0.5), kv), 1)
    qk, _ = _cosine(x, logit_scale)
    wide = qk.view(2, -1, *qk.shape[3:]).permute(2, 0, 1, 3)
    return torch.cat(((wide[:, :1] * factor).to(x.dtype), wide[:, 1:].to(x.dtype), x[:, 2:]), 1)


def _cosine(x: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """[Q, K] (2·heads, 1, 1, R, d) in float32 whose products are the logits, and what they were multiplied by."""
    pieces = x[:, :2].flatten(1, 2).transpose(0, 1)[:, None, None]
    wide, _, factor = factors_of_logits(pieces.to(statistics_dtype(x.dtype)), logit_scale)
    assert factor is not None
    return wide, factor


def _through_scale(grad: Tensor, qkv: Tensor, logit_scale: Tensor | None, num_heads: int
                   ) -> tuple[Tensor, Tensor | None]:
    """Gradients of qkv and of the logit scale from that of :func:`_scaled` of it, (B·T, 3·heads, d)."""
    factor = _root(grad.shape[-1])
    if logit_scale is None:
        grad[:, :num_heads] *= factor * grad.shape[-1] ** -0.5
        return grad.view(qkv.shape), None
    wide, factors = _cosine(qkv.reshape(len(grad), 3, num_heads, -1), logit_scale)
    dqk = grad[:, : 2 * num_heads].transpose(0, 1)[:, None, None].to(wide.dtype).contiguous()
    dqk[:num_heads] *= factor
    dscale = normalise_backward(dqk, wide, factors, logit_scale)
    grad[:, : 2 * num_heads] = dqk[:, 0, 0].transpose(0, 1).to(grad.dtype)
    return grad.view(qkv.shape), dscale


def _root(dim: int) -> float:
    """What the kernels divide logits by."""
    return math.sqrt(dim + MORE)
