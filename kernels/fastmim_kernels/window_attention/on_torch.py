"""The torch implementation of window attention: chunks of windows that stay in the cache.

Backward computes the attention weights again, but for small maps of small windows, whose weights a CPU keeps.

Every chunk is a handful of BLAS calls and in-place passes over buffers that are reused. Logits and softmax are in
float32 (float64 for float64), from float32 queries and keys. The other products are in bfloat16 where the processor
multiplies that, which takes half their time, else in float32 too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..common.cpu import has_bfloat16_units
from ..common.rows import statistics_dtype
from .layout import Pair, gather, pair, scatter, shift_mask

MAX_LOGIT_SCALE = math.log(100.0)
EPS = 1e-12
"""Smallest norm of a query or key of cosine attention, as in ``F.normalize``."""

NEGLIGIBLE = 1e-20
"""Attention weights of shifted windows below this, 1e-13 of the rounding of the row's sum, become 0."""

# Logits of a chunk. On a CPU the buffers of this many (14 bytes a logit at most) stay in the last cache; smaller ones,
# in the cache of a core, were slower: 40 % at 2^17. A GPU wants larger launches.
CHUNK_CPU = 1 << 19
CHUNK_GPU = 1 << 26

KEPT_WEIGHTS = 1 << 21
"""Attention weights that a CPU keeps at most, 8 MiB in float32: to find them again takes almost half of backward."""


def forward(qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, num_heads: int, window_size: Sequence[int],
            shift_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Arguments and results of the op ``fastmim::window_attention``; :func:`kept_weights` take the log-sum-exp's place.
    """
    qkv, window_size, shift_size = qkv.contiguous(), pair(window_size), pair(shift_size)
    x = gather(qkv, 3 * num_heads, window_size, shift_size).to(product_dtype(qkv))
    v = x[2 * num_heads :]
    scaled, alpha, _ = factors_of_logits(x[: 2 * num_heads], logit_scale)
    wide, kept = statistics_dtype(x.dtype), kept_weights(qkv, num_heads, window_size)
    out, logits = torch.empty_like(v), _buffer(v, wide)
    low = torch.empty_like(logits, dtype=v.dtype)
    weights = low if v.dtype == wide else torch.empty_like(logits)
    mask = shift_mask(*qkv.shape[1:3], window_size, shift_size, wide, qkv.device)
    for i in _chunks(v):
        low = _matrices(kept[i]) if kept.numel() else low
        p = _softmax(scaled, i, bias, mask, alpha, logits, low if v.dtype == wide else weights)
        torch.bmm(fitted(p, low), _matrices(v[i]), out=_matrices(out[i]))
    return scatter(out.to(qkv.dtype), qkv, window_size, shift_size), kept


def kept_weights(qkv: Tensor, num_heads: int, window_size: Pair) -> Tensor:
    """Uninitialised (heads, windows, B, N, N) for the attention weights where they are kept, else empty.

    Where a CPU multiplies in the dtype of qkv, N ≤ 2·d, which makes them two thirds of qkv at most, and there are no
    more than :data:`KEPT_WEIGHTS`.
    """
    (batch, height, width, channels), n = qkv.shape, window_size[0] * window_size[1]
    shape = num_heads, height * width // n, batch, n, n
    if qkv.is_cpu and product_dtype(qkv) == qkv.dtype and n <= 2 * channels // (3 * num_heads) \
            and math.prod(shape) <= KEPT_WEIGHTS:
        return qkv.new_empty(shape)
    return qkv.new_empty(0, dtype=torch.float32)


def backward(grad_out: Tensor, qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, out: Tensor | None, lse: Tensor,
             num_heads: int, window_size: Sequence[int], shift_size: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results of ``fastmim::window_attention_backward``; ``out`` is not read, ``lse`` is kept weights."""
    grad_out, qkv = grad_out.contiguous(), qkv.contiguous()
    window_size, shift_size = pair(window_size), pair(shift_size)
    x = gather(qkv, 3 * num_heads, window_size, shift_size).to(product_dtype(qkv))
    grad = gather(grad_out, num_heads, window_size, shift_size).to(x.dtype)
    qk, v = x.split((2 * num_heads, num_heads))
    scaled, alpha, factor = factors_of_logits(qk, logit_scale)
    mask = shift_mask(*qkv.shape[1:3], window_size, shift_size, statistics_dtype(x.dtype), qkv.device)
    dbias = _attention_backward(grad, scaled, qk.chunk(2)[1], v, bias, mask, alpha, lse)
    x[:num_heads] = grad
    del grad
    dscale = normalise_backward(qk, scaled, factor, logit_scale)
    dqkv = scatter(x.to(qkv.dtype), qkv, window_size, shift_size)
    return dqkv, dbias, dbias.new_empty(0) if dscale is None else dscale


def _attention_backward(grad: Tensor, scaled: Tensor, dk: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None,
                        alpha: float, kept: Tensor) -> Tensor:
    """Write dq, dk and dv over ``grad``, ``dk`` and v, (heads, windows, B, N, d) each; returns d bias.

    Of what is multiplied, ``scaled`` is [Q, K] and may share memory with ``dk``. Nothing else is left behind, so that
    an allocator has the buffers back for the result.
    """
    q, k = scaled.to(v.dtype).chunk(2)
    dbias = bias.new_zeros(bias.shape, dtype=statistics_dtype(v.dtype))
    buffers = [_buffer(v, dbias.dtype) for _ in range(3)]  # apart, since softmax is slow over what it reads
    low = buffers[1] if v.dtype == dbias.dtype else _buffer(v, v.dtype)
    for i in _chunks(v):
        p = _matrices(kept[i]) if kept.numel() else _softmax(scaled, i, bias, mask, alpha, buffers[1], buffers[0])
        operands = [_matrices(t[i]) for t in (grad, q, k, v)]
        ds = _chunk_backward(p, operands, _matrices(dk[i]), alpha, buffers, low)
        dbias[i[0]] += ds.unflatten(0, (len(dbias[i[0]]), -1)).sum(1)
    return dbias.div_(alpha)


def _chunk_backward(p: Tensor, operands: list[Tensor], dk: Tensor, alpha: float, buffers: list[Tensor], low: Tensor
                    ) -> Tensor:
    """Write dq, dk and dv of a chunk over do, ``dk`` and v, from do, q, k and v (matrices, N, d); returns α·d logits.

    ``dk`` may be k. The weights p have the dtype of the operands or that of the three ``buffers``, and may lie in the
    first of those; ``low`` has the dtype of the operands and may be the second.
    """
    do, q, k, v = operands
    weights, products, ds = (b[: p.shape[0]] for b in buffers)
    low = low[: p.shape[0]]
    # α·dp, so that α is part of a product: all behind it is linear.
    dp = fitted(torch.baddbmm(low, do, v.mT, beta=0, alpha=alpha, out=low), products)
    torch.bmm(fitted(p, low).mT, do, out=v)
    torch.ops.aten._softmax_backward_data.out(dp, fitted(p, weights), -1, ds.dtype, grad_input=ds)
    d_logits = fitted(ds, low)
    torch.bmm(d_logits, k, out=do)
    torch.bmm(d_logits.mT, q, out=dk)
    return ds


def product_dtype(x: Tensor) -> torch.dtype:
    """Of the products but that of the logits."""
    if x.dtype == torch.bfloat16 and (x.device.type != "cpu" or has_bfloat16_units()):
        return x.dtype
    return statistics_dtype(x.dtype)


def factors_of_logits(qk: Tensor, logit_scale: Tensor | None) -> tuple[Tensor, float, Tensor | None]:
    """[Q, K] and α of logits α·Q·Kᵀ, and what q and k (2·heads, …, d) were multiplied by, in float32 or better."""
    if logit_scale is None:
        return qk, qk.shape[-1] ** -0.5, None
    norm = torch.linalg.vector_norm(qk, dim=-1, keepdim=True, dtype=statistics_dtype(qk.dtype))
    factor = norm.clamp_(min=EPS).reciprocal_()
    factor[: len(qk) // 2] *= _scale(logit_scale, factor.dtype)
    return qk * factor, 1.0, factor


def fitted(x: Tensor, buffer: Tensor) -> Tensor:
    """x in the buffer's dtype; in the buffer where that is not its own."""
    return x if x.dtype == buffer.dtype else buffer[: x.shape[0]].copy_(x)


def _matrices(x: Tensor) -> Tensor:
    return x.view(-1, *x.shape[-2:])


def _buffer(q: Tensor, dtype: torch.dtype) -> Tensor:
    """(matrices of the largest chunk, N, N)."""
    heads, windows = next(_chunks(q))
    n = q.shape[3]
    return q.new_empty((heads.stop - heads.start) * (windows.stop - windows.start) * q.shape[2], n, n, dtype=dtype)


def _chunks(q: Tensor) -> Iterator[tuple[slice, slice]]:
    """Even ranges of heads and windows, the largest first; several heads only with all their windows."""
    heads, windows, batch, n, _ = q.shape
    budget = max(1, (CHUNK_CPU if q.device.type == "cpu" else CHUNK_GPU) // (batch * n * n))
    by_head, by_window = _even(heads, max(1, budget // windows)), _even(windows, budget)
    for h in range(0, heads, by_head):
        for w in range(0, windows, by_window):
            yield slice(h, min(h + by_head, heads)), slice(w, min(w + by_window, windows))


def _even(count: int, largest: int) -> int:
    """Length of equal ranges, as few as there must be, that cover ``count``."""
    return -(-count // -(-count // largest))


def _softmax(qk: Tensor, chunk: tuple[slice, slice], bias: Tensor, mask: Tensor | None, alpha: float, logits: Tensor,
             weights: Tensor) -> Tensor:
    """Attention weights (matrices, N, N) of a chunk, in the buffer ``weights``.

    Over its logits torch's softmax takes half as long again, and its gradient twice as long.
    """
    q, k = (t[chunk].to(logits.dtype) for t in qk.chunk(2))
    logits, weights = (b[: q.shape[0] * q.shape[1] * q.shape[2]] for b in (logits, weights))
    shaped = logits.view(*q.shape[:3], *logits.shape[1:])
    bias = bias[chunk[0], None, None]
    if mask is None:
        shaped.copy_(bias)
    else:
        torch.add(bias.expand(-1, -1, q.shape[2], -1, -1), mask[chunk[1], None], out=shaped)
    torch.baddbmm(logits, _matrices(q), _matrices(k).mT, alpha=alpha, out=logits)
    p = torch.softmax(logits, -1, out=weights)
    # exp(−100) is a subnormal float32, with which a CPU multiplies ten times slower.
    return p if mask is None else torch.threshold_(p, NEGLIGIBLE, 0)


def _scale(logit_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return logit_scale.reshape(-1, 1, 1, 1, 1).to(dtype).clamp(max=MAX_LOGIT_SCALE).exp()


def normalise_backward(grad: Tensor, y: Tensor, factor: Tensor | None, logit_scale: Tensor | None) -> Tensor | None:
    """Turn the gradient of ``y = factor·x`` (q and k) into that of x, in place; returns that of the logit scale."""
    if factor is None or logit_scale is None:
        return None
    wide, heads = grad.to(y.dtype), len(grad) // 2
    dot = (wide * y).sum(-1, keepdim=True)
    dscale = dot[:heads].sum((1, 2, 3, 4)) * (logit_scale.reshape(-1) <= MAX_LOGIT_SCALE)
    dot[:heads] /= _scale(logit_scale, y.dtype).square()
    grad.copy_(wide.addcmul_(y, dot, value=-1).mul_(factor))
    return dscale.reshape(logit_scale.shape)
