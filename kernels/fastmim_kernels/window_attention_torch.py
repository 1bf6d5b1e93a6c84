"""The torch implementation of window attention: chunks of windows that stay in the cache, backward by recomputation.

Every chunk is a handful of BLAS calls and in-place passes over buffers that are reused, in float32 (float64 for
float64): on a CPU that is as fast as bfloat16, whose softmax would be converted back and forth, and more accurate.
In bfloat16, large windows without a shift mask go forward through torch's CPU flash attention, whose log-sum-exp
saves backward the softmax. Not in float32, where the rounding of a log-sum-exp near 100 (cosine attention's largest
logit) would be the largest error. Its own backward has no bias gradient and is twenty times slower than this one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import reference
from .rows import statistics_dtype

MAX_LOGIT_SCALE = math.log(100.0)
EPS = 1e-12
"""Smallest norm of a query or key of cosine attention, as in ``F.normalize``."""

NEGLIGIBLE = 1e-20
"""Attention weights of shifted windows below this, 1e-13 of the rounding of the row's sum, become 0."""

Pair = tuple[int, int]

# Logits of a chunk: two float32 buffers of this many should fit a core's L2 cache; a GPU wants larger launches.
_CHUNK_CPU = 1 << 18
_CHUNK_GPU = 1 << 26
# Tokens of a window from which flash attention beats the chunks (at 36 it is slower, at 144 faster).
_FLASH_WINDOW = 128


def forward(qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, num_heads: int, window_size: Pair,
            shift_size: Pair) -> tuple[Tensor, Tensor]:
    """(B, H, W, 3C) → (B, H, W, C), and the log-sum-exp (B·windows, heads, N) of flash attention or an empty one."""
    if lse_shape(qkv, num_heads, window_size, shift_size) != (0,):
        return _flash_forward(qkv, bias, logit_scale, num_heads, window_size)
    q, k, v = _gather(qkv, 3 * num_heads, window_size, shift_size).chunk(3)
    if logit_scale is not None:
        _normalise(q, _scale(logit_scale, q.dtype))
        _normalise(k, None)
    else:
        q *= q.shape[-1] ** -0.5
    out, logits = torch.empty_like(q), _buffer(q)
    mask = _mask(qkv, window_size, shift_size, q.dtype)
    for heads, windows in _chunks(q):
        p = _softmax(q[heads, windows], k[heads, windows], bias[heads], None if mask is None else mask[windows], logits)
        torch.bmm(p, _matrices(v[heads, windows]), out=_matrices(out[heads, windows]))
    return _scatter(out, qkv, window_size, shift_size), qkv.new_empty(0, dtype=torch.float32)


def backward(grad_out: Tensor, qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, out: Tensor, lse: Tensor,
             num_heads: int, window_size: Pair, shift_size: Pair) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of qkv, bias (in the dtype of the softmax) and logit_scale; ``out`` is not read."""
    x = _gather(qkv, 3 * num_heads, window_size, shift_size)
    grad = _gather(grad_out, num_heads, window_size, shift_size)
    q, k, v = x.chunk(3)
    if logit_scale is not None:
        inverse = _normalise(q, _scale(logit_scale, q.dtype)), _normalise(k, None)
    else:
        q *= q.shape[-1] ** -0.5
    if lse.numel():
        # Flash attention saw queries and keys that were rounded to bfloat16; its log-sum-exp fits no others.
        x[: 2 * num_heads].copy_(x[: 2 * num_heads].to(qkv.dtype))
        lse = lse.view(qkv.shape[0], -1, num_heads, lse.shape[-1], 1).permute(2, 1, 0, 3, 4)
    dx, dbias = torch.empty_like(x), bias.new_zeros(bias.shape, dtype=q.dtype)
    dq, dk, dv = dx.chunk(3)
    logits, products = _buffer(q), _buffer(q)
    mask = _mask(qkv, window_size, shift_size, q.dtype)
    for i in _chunks(q):
        heads, windows = i
        p = _softmax(q[i], k[i], bias[heads], None if mask is None else mask[windows], logits,
                     lse[i] if lse.numel() else None)
        do, ds = _matrices(grad[i]), products[: p.shape[0]]
        torch.bmm(p.mT, do, out=_matrices(dv[i]))
        torch.bmm(do, _matrices(v[i]).mT, out=ds)
        torch.ops.aten._softmax_backward_data.out(ds, p, -1, ds.dtype, grad_input=ds)
        dbias[heads] += ds.unflatten(0, (heads.stop - heads.start, -1)).sum(1)
        torch.bmm(ds, _matrices(k[i]), out=_matrices(dq[i]))
        torch.bmm(ds.mT, _matrices(q[i]), out=_matrices(dk[i]))
    dscale = None
    if logit_scale is None:
        dq *= q.shape[-1] ** -0.5
    else:
        dscale = _normalise_backward(dq, q, inverse[0], _scale(logit_scale, q.dtype))
        _normalise_backward(dk, k, inverse[1], None)
        inside = logit_scale.reshape(-1) <= MAX_LOGIT_SCALE
        dscale = (dscale * inside).reshape(logit_scale.shape).to(logit_scale.dtype)
    return _scatter(dx, qkv, window_size, shift_size), dbias, dscale


def _matrices(x: Tensor) -> Tensor:
    return x.flatten(0, -3)


def _buffer(q: Tensor) -> Tensor:
    """(matrices of the largest chunk, N, N)."""
    heads, windows = next(_chunks(q))
    n = q.shape[3]
    return q.new_empty((heads.stop - heads.start) * (windows.stop - windows.start) * q.shape[2], n, n)


def _chunks(q: Tensor) -> Iterator[tuple[slice, slice]]:
    """Ranges of heads and windows, the largest first; several heads only with all their windows."""
    heads, windows, batch, n, _ = q.shape
    budget = max(1, (_CHUNK_CPU if q.device.type == "cpu" else _CHUNK_GPU) // (batch * n * n))
    by_head = min(heads, max(1, budget // windows))
    by_window = windows if budget >= windows else budget
    for h in range(0, heads, by_head):
        for w in range(0, windows, by_window):
            yield slice(h, min(h + by_head, heads)), slice(w, min(w + by_window, windows))


def _softmax(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor | None, buffer: Tensor, lse: Tensor | None = None
             ) -> Tensor:
    """Attention weights (matrices, N, N) of a chunk, in the buffer; exp(logits − lse) where that is known."""
    logits = buffer[: q.shape[0] * q.shape[1] * q.shape[2]]
    shaped = logits.view(*q.shape[:3], *logits.shape[1:])
    bias = bias[:, None, None]
    if lse is not None:
        torch.sub(bias, lse, out=shaped)
        return torch.baddbmm(logits, _matrices(q), _matrices(k).mT, out=logits).exp_()
    if mask is None:
        shaped.copy_(bias)
    else:
        torch.add(bias.expand(-1, -1, q.shape[2], -1, -1), mask[:, None], out=shaped)
    torch.baddbmm(logits, _matrices(q), _matrices(k).mT, out=logits)
    p = torch.softmax(logits, -1, out=logits)
    # exp(−100) is a subnormal float32, with which a CPU multiplies ten times slower.
    return p if mask is None else torch.threshold_(p, NEGLIGIBLE, 0)


def lse_shape(qkv: Tensor, num_heads: int, window_size: Sequence[int], shift_size: Sequence[int]
              ) -> tuple[int, ...]:
    """Of the log-sum-exp that :func:`forward` returns: (0,) where flash attention is not used."""
    n = window_size[0] * window_size[1]
    fits = qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 and not any(shift_size)
    if not fits or n < _FLASH_WINDOW:
        return (0,)
    return qkv.shape[0] * qkv.shape[1] * qkv.shape[2] // n, num_heads, n


def _flash_forward(qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, num_heads: int, window_size: Pair
                   ) -> tuple[Tensor, Tensor]:
    batch, height, width, c3 = qkv.shape
    (wh, ww), d = window_size, c3 // 3 // num_heads
    x = qkv.view(batch, height // wh, wh, width // ww, ww, c3).transpose(2, 3)
    q, k, v = x.reshape(-1, wh * ww, 3, num_heads, d).transpose(1, 3).unbind(2)
    if logit_scale is None:
        q = q * d**-0.5
    else:
        scale = _scale(logit_scale, torch.float32).view(-1, 1, 1)
        q = torch.mul(q, _factor(q, scale), out=torch.empty_like(q))
        k = torch.mul(k, _factor(k, None), out=torch.empty_like(k))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=bias.to(torch.float32).expand(q.shape[0], -1, -1, -1), scale=1.0)
    out = out.transpose(1, 2).reshape(batch, height // wh, width // ww, wh, ww, c3 // 3).transpose(2, 3)
    return out.reshape(batch, height, width, c3 // 3), lse.contiguous()


def _scale(logit_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return logit_scale.reshape(-1, 1, 1, 1, 1).to(dtype).clamp(max=MAX_LOGIT_SCALE).exp()


def _factor(x: Tensor, scale: Tensor | None) -> Tensor:
    """What makes the rows (…, d) of x unit vectors times ``scale``, (…, 1) in float32 or better."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=statistics_dtype(x.dtype))
    factor = norm.clamp_(min=EPS).reciprocal_()
    return factor if scale is None else factor.mul_(scale)


def _normalise(x: Tensor, scale: Tensor | None) -> Tensor:
    """Multiply the rows of x (heads, windows, B, N, d) by :func:`_factor`, in place; returns the factors."""
    factor = _factor(x, scale)
    x *= factor
    return factor


def _normalise_backward(grad: Tensor, y: Tensor, factor: Tensor, scale: Tensor | None) -> Tensor:
    """Turn the gradient of ``y = x·factor`` into that of x, in place; returns Σ grad·y of each head."""
    dot = (grad * y).sum(-1, keepdim=True)
    total = dot.sum((1, 2, 3, 4))
    if scale is not None:
        dot /= scale.square()
    grad.addcmul_(y, dot, value=-1).mul_(factor)
    return total


def _gather(x: Tensor, parts: int, window_size: Pair, shift_size: Pair) -> Tensor:
    """(B, H, W, parts·d) → own copy (parts, windows, B, N, d) of the rolled map, in float32 or better."""
    batch, height, width, channels = x.shape
    d, dtype = channels // parts, statistics_dtype(x.dtype)
    shape = parts, height * width // (window_size[0] * window_size[1]), batch, window_size[0] * window_size[1], d
    if any(shift_size):
        rows, _ = _rows(batch, height, width, parts, window_size, shift_size, x.device)
        return x.reshape(-1, d).index_select(0, rows).to(dtype).view(shape)
    windows = _windows(x, parts, window_size)
    return torch.empty(windows.shape, dtype=dtype, device=x.device).copy_(windows).view(shape)


def _scatter(x: Tensor, like: Tensor, window_size: Pair, shift_size: Pair) -> Tensor:
    """Inverse of :func:`_gather`, in the dtype and map size of ``like``."""
    batch, height, width, _ = like.shape
    parts, d = x.shape[0], x.shape[-1]
    if any(shift_size):
        _, inverse = _rows(batch, height, width, parts, window_size, shift_size, x.device)
        return x.to(like.dtype).view(-1, d).index_select(0, inverse).view(batch, height, width, parts * d)
    out = like.new_empty(batch, height, width, parts * d)
    windows = _windows(out, parts, window_size)
    windows.copy_(x.view(windows.shape))
    return out


def _windows(x: Tensor, parts: int, window_size: Pair) -> Tensor:
    """View (B, H, W, parts·d) as (parts, window rows, window columns, B, rows, columns, d)."""
    batch, height, width, channels = x.shape
    wh, ww = window_size
    x = x.view(batch, height // wh, wh, width // ww, ww, parts, channels // parts)
    return x.permute(5, 1, 3, 0, 2, 4, 6)


@lru_cache(maxsize=32)
def _rows(batch: int, height: int, width: int, parts: int, window_size: Pair, shift_size: Pair, device: torch.device
          ) -> tuple[Tensor, Tensor]:
    """Where each row of (parts, windows, B, N) lies in (B, H, W, parts), and the inverse.

    Called inside custom ops only, so that what is cached is always a real tensor.
    """
    size = batch * height * width * parts
    rows = torch.arange(size, device=device).view(batch, height, width, parts)
    rows = rows.roll((-shift_size[0], -shift_size[1]), (1, 2))
    rows = _windows(rows, parts, window_size).reshape(-1)
    inverse = torch.empty_like(rows)
    inverse[rows] = torch.arange(size, device=device)
    return rows, inverse


def _mask(qkv: Tensor, window_size: Pair, shift_size: Pair, dtype: torch.dtype) -> Tensor | None:
    if not any(shift_size):
        return None
    return _shift_mask(qkv.shape[1], qkv.shape[2], window_size, shift_size, dtype, qkv.device)


@lru_cache(maxsize=32)
def _shift_mask(height: int, width: int, window_size: Pair, shift_size: Pair, dtype: torch.dtype, device: torch.device
                ) -> Tensor:
    """(windows, N, N) of 0/−100, built once per geometry."""
    groups = reference.shift_groups(height, width, shift_size, device)
    groups = reference.partition(groups[None, ..., None], window_size)[..., 0]
    return (groups[:, :, None] != groups[:, None, :]).to(dtype).mul_(reference.MASKED_LOGIT)
