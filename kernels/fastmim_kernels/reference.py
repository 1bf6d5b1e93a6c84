"""Oracles: one plain function per op, written for reading, run in float32 or float64.

Nothing here is fast. Every other implementation of an op is compared with the function of the same
name in this file, forward and gradients.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED_LOGIT = -100.0
"""Added to the logits of token pairs that the cyclic shift brought together (Swin, section 3.2)."""


def mask_tokens(tokens: Tensor, mask: Tensor, mask_token: Tensor) -> Tensor:
    """``tokens·(1−m) + mask_token·m`` on (B, H, W, C) with mask (B, H, W)."""
    m = mask.to(tokens.dtype).unsqueeze(-1)
    return tokens * (1 - m) + mask_token.reshape(-1).to(tokens.dtype) * m


def shift_groups(height: int, width: int, shift_size: tuple[int, int], device: torch.device) -> Tensor:
    """Group of each position of the *rolled* map; only tokens of one group attend to each other."""
    rows = torch.arange(height, device=device) >= height - shift_size[0]
    cols = torch.arange(width, device=device) >= width - shift_size[1]
    return rows.long()[:, None] * 2 + cols.long()[None, :]


def partition(x: Tensor, window_size: tuple[int, int]) -> Tensor:
    """(B, H, W, C) → (B·windows, N, C), windows in row-major order."""
    b, h, w, c = x.shape
    wh, ww = window_size
    x = x.reshape(b, h // wh, wh, w // ww, ww, c).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, wh * ww, c)


def unpartition(x: Tensor, window_size: tuple[int, int], height: int, width: int) -> Tensor:
    """Inverse of :func:`partition`."""
    wh, ww = window_size
    x = x.reshape(-1, height // wh, width // ww, wh, ww, x.shape[-1]).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(x.shape[0], height, width, x.shape[-1])


def window_attention(
    qkv: Tensor,
    bias: Tensor,
    logit_scale: Tensor | None,
    num_heads: int,
    window_size: tuple[int, int],
    shift_size: tuple[int, int],
) -> Tensor:
    """Shifted-window attention of Swin (``logit_scale`` None) or SwinV2 (cosine), see the public op."""
    _, height, width, c3 = qkv.shape
    shifts = (-shift_size[0], -shift_size[1])
    windows = partition(torch.roll(qkv, shifts, (1, 2)), window_size)
    head_dim = c3 // 3 // num_heads
    n = windows.shape[1]
    q, k, v = windows.reshape(-1, n, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4)
    if logit_scale is None:
        logits = (q @ k.transpose(-2, -1)) / math.sqrt(head_dim)
    else:
        scale = logit_scale.reshape(-1, 1, 1).clamp(max=math.log(100.0)).exp()
        logits = (
            F.normalize(q, dim=-1, eps=1e-12) @ F.normalize(k, dim=-1, eps=1e-12).transpose(-2, -1) * scale
        )
    logits = logits + bias
    if any(shift_size):
        groups = shift_groups(height, width, shift_size, qkv.device)
        groups = partition(groups[None, ..., None], window_size)[..., 0]
        apart = groups[:, :, None] != groups[:, None, :]
        logits = logits.unflatten(0, (-1, apart.shape[0])) + MASKED_LOGIT * apart[:, None].to(logits.dtype)
        logits = logits.flatten(0, 1)
    out = (logits.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)
    return torch.roll(unpartition(out, window_size, height, width), shift_size, (1, 2))


def visible_attention(
    qkv: Tensor,
    bias: Tensor,
    logit_scale: Tensor | None,
    padding: Tensor | None,
    slots: Tensor,
    places: Tensor,
    groups: Tensor | None,
    num_heads: int,
) -> Tensor:
    """:func:`window_attention` of (B, T, 3C) tokens, which ``slots`` and ``places`` put into windows, see the op."""
    slots = torch.empty_like(slots).scatter(2, places, slots)
    batch, tokens, c3 = qkv.shape
    head_dim, dtype = c3 // 3 // num_heads, qkv.dtype
    padding = qkv.new_zeros(c3) if padding is None else padding.to(dtype)
    # Behind the tokens padding (-2) and nobody (-1).
    rows = torch.cat((qkv, padding.expand(batch, 1, -1), qkv.new_zeros(batch, 1, c3)), 1)
    index = slots.flatten(1).remainder(tokens + 2)[..., None]
    windows = rows.gather(1, index.expand(-1, -1, c3)).unflatten(1, slots.shape[1:])
    q, k, v = windows.unflatten(-1, (3, num_heads, head_dim)).permute(3, 0, 1, 4, 2, 5)
    if logit_scale is None:
        logits = (q @ k.mT) / math.sqrt(head_dim)
    else:
        scale = logit_scale.reshape(-1, 1, 1).clamp(max=math.log(100.0)).exp()
        logits = F.normalize(q, dim=-1, eps=1e-12) @ F.normalize(k, dim=-1, eps=1e-12).mT * scale
    logits = logits + bias
    if groups is not None:
        logits = logits + MASKED_LOGIT * (groups[:, None, :, None] != groups[:, None, None]).to(logits.dtype)
    logits = logits.masked_fill((slots == -1)[:, :, None, None], torch.finfo(logits.dtype).min)
    out = (logits.softmax(-1).to(dtype) @ v).transpose(2, 3).flatten(3)
    found = out.new_zeros(batch, tokens + 2, c3 // 3)
    return found.scatter(1, index.expand(-1, -1, c3 // 3), out.flatten(1, 2))[:, :tokens]


def cpb_bias(coords: Tensor, index: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> Tensor:
    """SwinV2's log-spaced continuous position bias of L blocks: 16·sigmoid(MLP(coords))[index]."""
    hidden = torch.relu(torch.einsum("tc,lkc->ltk", coords, weight1) + bias1[:, None])
    table = 16 * torch.sigmoid(torch.einsum("ltk,lhk->lht", hidden, weight2))
    return table[:, :, index]


def patch_merge(x: Tensor) -> Tensor:
    """(B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, 4C), the four neighbours column by column, zeros beyond the edge."""
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
    return torch.cat(parts, -1)


def local_norm_target(images: Tensor, kernel_size: int) -> Tensor:
    """Sliding-window normalisation of (B, C, H, W) by three average pools (SimMIM's normalised target)."""
    pad = kernel_size // 2
    mean = F.avg_pool2d(images, kernel_size, 1, pad, count_include_pad=False)
    square = F.avg_pool2d(images**2, kernel_size, 1, pad, count_include_pad=False)
    count = (
        F.avg_pool2d(torch.ones_like(images), kernel_size, 1, pad, count_include_pad=True) * kernel_size**2
    )
    var = ((square - mean**2) * (count / (count - 1))).clamp(min=0)
    return (images - mean) / (var + 1e-6).sqrt()


def pixel_shuffle(prediction: Tensor, stride: int) -> Tensor:
    """(B, h, w, C·stride²) token predictions → (B, C, h·stride, w·stride) pixels."""
    b, h, w, c = prediction.shape
    pixels = prediction.reshape(b, h, w, c // stride**2, stride, stride).permute(0, 3, 1, 4, 2, 5)
    return pixels.reshape(b, c // stride**2, h * stride, w * stride)


def unshuffle(tokens: Tensor, places: Tensor, mask_token: Tensor, pos_embed: Tensor) -> Tensor:
    """Kept (B, 1 + K, C) tokens in the ``places`` (B, L) of all patches, −1: the mask token; plus positions."""
    b, _, c = tokens.shape
    every = torch.cat((mask_token.reshape(1, 1, c).expand(b, -1, -1), tokens[:, 1:]), 1)
    patches = every.gather(1, (places + 1).unsqueeze(-1).expand(-1, -1, c))
    return torch.cat((tokens[:, :1], patches), 1) + pos_embed.reshape(1, -1, c)


def patch_target(images: Tensor, stride: int, eps: float) -> Tensor:
    """(B, C, h·s, w·s): each square of ``stride`` pixels, over all channels, by its mean and unbiased deviation."""
    patches = F.unfold(images, stride, stride=stride)
    mean, var = patches.mean(1, keepdim=True), patches.var(1, keepdim=True)
    return F.fold((patches - mean) / (var + eps).sqrt(), images.shape[-2:], stride, stride=stride)


def pointwise_loss(prediction: Tensor, target: Tensor, loss: str) -> Tensor:
    """Elementwise ``l1``, ``l2`` or ``smooth_l1`` (β = 1)."""
    if loss == "l1":
        return (prediction - target).abs()
    if loss == "l2":
        return (prediction - target) ** 2
    return F.smooth_l1_loss(prediction, target, reduction="none")


def masked_l1(
    prediction: Tensor, target: Tensor, mask: Tensor, stride: int, loss: str, eps: float = 1e-5
) -> Tensor:
    """Σ(l(x̂, x)·m) / (Σm + eps) / C with the mask repeated to pixels (B, 1, H, W)."""
    _, channels, height, width = target.shape
    pixels = pixel_shuffle(prediction, stride)[:, :, :height, :width].to(target.dtype)
    m = mask.to(target.dtype)
    m = m.repeat_interleave(height // mask.shape[1], 1).repeat_interleave(width // mask.shape[2], 2)[:, None]
    return (pointwise_loss(pixels, target, loss) * m).sum() / (m.sum() + eps) / channels


def residual_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_bias: Tensor | None,
    drop_scale: Tensor | None,
    gamma: Tensor | None,
    order: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(r, LN(r)), r = residual + s·γ·(branch + b); in order "post" (r, r), r = residual + s·LN(branch + b)."""
    if branch_bias is not None:
        branch = branch + branch_bias
    if order == "post":
        branch = F.layer_norm(branch, weight.shape, weight, bias, eps)
    if gamma is not None:
        branch = branch * gamma
    if drop_scale is not None:
        branch = branch * drop_scale.reshape(-1, *[1] * (branch.ndim - 1))
    added = residual + branch
    return added, added if order == "post" else F.layer_norm(added, weight.shape, weight, bias, eps)


def gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """z·Φ(z) with z = x + bias and Φ the distribution function of the standard normal."""
    z = x if bias is None else x + bias
    return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None) -> Tensor:
    """Linear – exact GELU – Linear."""
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def patch_merge_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the 4C channels of :func:`patch_merge`."""
    return F.layer_norm(patch_merge(x), weight.shape, weight, bias, eps)


def distillation(
    student: Tensor,
    teacher: Tensor,
    centre: Tensor,
    weight: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    pairs: list[tuple[int, int]],
) -> tuple[Tensor, Tensor]:
    """(Σ w·CE, Σ w·H) of student views (V, B, K) and teacher views (U, B, K) over ``pairs`` (v, u); w is (V, B)."""
    log_student = F.log_softmax(student / student_temp, -1)
    log_teacher = F.log_softmax((teacher - centre) / teacher_temp, -1)
    target = log_teacher.exp()
    loss = entropy = student.new_zeros(())
    for v, u in pairs:
        loss = loss - (weight[v] * (target[u] * log_student[v]).sum(-1)).sum()
        entropy = entropy - (weight[v] * (target[u] * log_teacher[u]).sum(-1)).sum()
    return loss, entropy
