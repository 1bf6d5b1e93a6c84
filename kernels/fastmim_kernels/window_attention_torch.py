"""The torch implementation of window attention: chunks of windows that stay in the cache, backward by recomputation.

Every chunk is a handful of BLAS calls and in-place passes over buffers that are reused. Logits and softmax are in
float32 (float64 for float64), from float32 queries and keys. The other products are in bfloat16 where the processor
multiplies that, which takes half their time, else in float32 too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from .rows import statistics_dtype
from .window_layout import Pair, gather, scatter, shift_mask

MAX_LOGIT_SCALE = math.log(100.0)
EPS = 1e-12
"""Smallest norm of a query or key of cosine attention, as in ``F.normalize``."""

NEGLIGIBLE = 1e-20
"""Attention weights of shifted windows below this, 1e-13 of the rounding of the row's sum, become 0."""

# Logits of a chunk. On a CPU two float32 buffers of this many stay in the last cache; smaller ones, in the cache of a
# core, were slower: 40 % at 2^17. A GPU wants larger launches.
_CHUNK_CPU = 1 << 20
_CHUNK_GPU = 1 << 26


def forward(qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, num_heads: int, window_size: Pair,
            shift_size: Pair) -> tuple[Tensor, Tensor]:
    """(B, H, W, 3C) → (B, H, W, C), and an empty tensor for the log-sum-exp that other implementations keep."""
    q, k, v = gather(qkv, 3 * num_heads, window_size, shift_size).to(_product_dtype(qkv)).chunk(3)
    wide, alpha, _ = _factors_of_logits(q, k, logit_scale)
    out, logits = torch.empty_like(v), _buffer(v, wide[0].dtype)
    low = logits if v.dtype == logits.dtype else _buffer(v, v.dtype)
    mask = shift_mask(*qkv.shape[1:3], window_size, shift_size, logits.dtype, qkv.device)
    for i in _chunks(v):
        heads, windows = i
        p = _softmax(wide[0][i], wide[1][i], bias[heads], None if mask is None else mask[windows], alpha, logits)
        torch.bmm(_cast(p, low), _matrices(v[i]), out=_matrices(out[i]))
    return scatter(out.to(qkv.dtype), qkv, window_size, shift_size), qkv.new_empty(0, dtype=torch.float32)


def backward(grad_out: Tensor, qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, out: Tensor, lse: Tensor,
             num_heads: int, window_size: Pair, shift_size: Pair) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of qkv, bias (in the dtype of the softmax) and logit_scale; ``out`` and ``lse`` are not read."""
    narrow = _product_dtype(qkv)
    x = gather(qkv, 3 * num_heads, window_size, shift_size).to(narrow)
    grad = gather(grad_out, num_heads, window_size, shift_size).to(narrow)
    q, k, v = x.chunk(3)
    wide, alpha, factors = _factors_of_logits(q, k, logit_scale)
    if factors is not None:
        q, k = (t.to(narrow) for t in wide)
    dx, dbias = torch.empty_like(x), bias.new_zeros(bias.shape, dtype=wide[0].dtype)
    dq, dk, dv = dx.chunk(3)
    logits, products = _buffer(q, wide[0].dtype), _buffer(q, wide[0].dtype)
    low = products if narrow == products.dtype else _buffer(q, narrow)
    mask = shift_mask(*qkv.shape[1:3], window_size, shift_size, logits.dtype, qkv.device)
    for i in _chunks(q):
        heads, windows = i
        p = _softmax(wide[0][i], wide[1][i], bias[heads], None if mask is None else mask[windows], alpha, logits)
        do = _matrices(grad[i])
        torch.bmm(_cast(p, low).mT, do, out=_matrices(dv[i]))
        ds = _cast(torch.bmm(do, _matrices(v[i]).mT, out=low[: p.shape[0]]), products)
        torch.ops.aten._softmax_backward_data.out(ds, p, -1, ds.dtype, grad_input=ds)
        dbias[heads] += ds.unflatten(0, (heads.stop - heads.start, -1)).sum(1)
        ds = _cast(ds if alpha == 1 else ds.mul_(alpha), low)
        torch.bmm(ds, _matrices(k[i]), out=_matrices(dq[i]))
        torch.bmm(ds.mT, _matrices(q[i]), out=_matrices(dk[i]))
    dscale = None
    if logit_scale is not None and factors is not None:
        dscale = _normalise_backward(dq, wide[0], factors[0], _scale(logit_scale, logits.dtype))
        _normalise_backward(dk, wide[1], factors[1], None)
        inside = logit_scale.reshape(-1) <= MAX_LOGIT_SCALE
        dscale = (dscale * inside).reshape(logit_scale.shape).to(logit_scale.dtype)
    return scatter(dx.to(qkv.dtype), qkv, window_size, shift_size), dbias, dscale


@lru_cache(maxsize=1)
def _cpu_multiplies_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _product_dtype(x: Tensor) -> torch.dtype:
    """Of the products but that of the logits."""
    if x.dtype == torch.bfloat16 and (x.device.type != "cpu" or _cpu_multiplies_bfloat16()):
        return x.dtype
    return statistics_dtype(x.dtype)


def _factors_of_logits(q: Tensor, k: Tensor, logit_scale: Tensor | None
                       ) -> tuple[list[Tensor], float, tuple[Tensor, Tensor] | None]:
    """[Q, K] in float32 or better and α of logits α·Q·Kᵀ, and what made unit vectors of q and k."""
    wide = statistics_dtype(q.dtype)
    if logit_scale is None:
        return [q.to(wide), k.to(wide)], q.shape[-1] ** -0.5, None
    factors = _factor(q, _scale(logit_scale, wide)), _factor(k, None)
    return [q * factors[0], k * factors[1]], 1.0, factors


def _cast(x: Tensor, buffer: Tensor) -> Tensor:
    """x in the buffer's dtype; in the buffer where that is not its own."""
    return x if x.dtype == buffer.dtype else buffer[: x.shape[0]].copy_(x)


def _matrices(x: Tensor) -> Tensor:
    return x.flatten(0, -3)


def _buffer(q: Tensor, dtype: torch.dtype) -> Tensor:
    """(matrices of the largest chunk, N, N)."""
    heads, windows = next(_chunks(q))
    n = q.shape[3]
    return q.new_empty((heads.stop - heads.start) * (windows.stop - windows.start) * q.shape[2], n, n, dtype=dtype)


def _chunks(q: Tensor) -> Iterator[tuple[slice, slice]]:
    """Even ranges of heads and windows, the largest first; several heads only with all their windows."""
    heads, windows, batch, n, _ = q.shape
    budget = max(1, (_CHUNK_CPU if q.device.type == "cpu" else _CHUNK_GPU) // (batch * n * n))
    by_head, by_window = _even(heads, max(1, budget // windows)), _even(windows, budget)
    for h in range(0, heads, by_head):
        for w in range(0, windows, by_window):
            yield slice(h, min(h + by_head, heads)), slice(w, min(w + by_window, windows))


def _even(count: int, largest: int) -> int:
    """Length of equal ranges, as few as there must be, that cover ``count``."""
    return -(-count // -(-count // largest))


def _softmax(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor | None, alpha: float, buffer: Tensor
             ) -> Tensor:
    """Attention weights (matrices, N, N) of a chunk, in the buffer."""
    logits = buffer[: q.shape[0] * q.shape[1] * q.shape[2]]
    shaped = logits.view(*q.shape[:3], *logits.shape[1:])
    bias = bias[:, None, None]
    if mask is None:
        shaped.copy_(bias)
    else:
        torch.add(bias.expand(-1, -1, q.shape[2], -1, -1), mask[:, None], out=shaped)
    torch.baddbmm(logits, _matrices(q), _matrices(k).mT, alpha=alpha, out=logits)
    p = torch.softmax(logits, -1, out=logits)
    # exp(−100) is a subnormal float32, with which a CPU multiplies ten times slower.
    return p if mask is None else torch.threshold_(p, NEGLIGIBLE, 0)


def _scale(logit_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return logit_scale.reshape(-1, 1, 1, 1, 1).to(dtype).clamp(max=MAX_LOGIT_SCALE).exp()


def _factor(x: Tensor, scale: Tensor | None) -> Tensor:
    """What makes the rows (…, d) of x unit vectors times ``scale``, (…, 1) in float32 or better."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=statistics_dtype(x.dtype))
    factor = norm.clamp_(min=EPS).reciprocal_()
    return factor if scale is None else factor.mul_(scale)


def _normalise_backward(grad: Tensor, y: Tensor, factor: Tensor, scale: Tensor | None) -> Tensor:
    """Turn the gradient of ``y = x·factor`` into that of x, in place; returns Σ grad·y of each head."""
    wide = grad.to(y.dtype)
    dot = (wide * y).sum(-1, keepdim=True)
    total = dot.sum((1, 2, 3, 4))
    if scale is not None:
        dot /= scale.square()
    grad.copy_(wide.addcmul_(y, dot, value=-1).mul_(factor))
    return total
