"""Other people's attention under the signature of our ``window_attention``: what each lacks is done around it.

A rival is called with our op's arguments, and rolls, cuts the windows and puts them back where our op needs none of
that. What it cannot do at all is said in ``lacks``.
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_works import Work
from fastmim_kernels.reference import MASKED_LOGIT, partition, shift_groups, unpartition

CLONE = "flash-window-attention-v2"
PACKAGE, FUNCTION = "flash_win_attn_v2", "flash_win_attn_v2_func"
CLAIM = f"to beat: {CLONE} states 1.42x on a SwinV2 model's backward and half the memory"
NAMES = (CLONE, "sdpa", "flex", "natten")
_WINDOWS = "windows are cut before it and put back after it (timed)"


class Absent(Exception):
    """A rival that cannot run here; says why."""


@dataclass(frozen=True)
class Rival:
    """One of :data:`NAMES`.

    Args:
        name: Of the CSV.
        attention: Called like ``fastmim_kernels.window_attention`` without ``impl``.
        lacks: What our op does and this one does not, or does only around its kernel.
        grads: Arguments that it has gradients of.
        has_bias, has_shift: Whether it takes a position bias, and tells apart what the shift brought together.
    """

    name: str
    attention: Callable[..., Tensor]
    lacks: str
    grads: tuple[str, ...] = ("qkv", "bias", "logit_scale")
    has_bias: bool = True
    has_shift: bool = True

    def work(self, work: Work) -> Work:
        """The part of ``work`` that it can do, which ours does beside it."""
        arguments = dict(work.arguments)
        if not self.has_bias:
            arguments["bias"] = torch.zeros_like(arguments["bias"])
        if not self.has_shift:
            arguments["shift_size"] = (0, 0)
        return replace(work, arguments=arguments, grads=tuple(g for g in work.grads if g in self.grads))


def find(name: str, reference: Path | None, device: torch.device, *, cosine: bool) -> Rival:
    """The rival of a name.

    Raises:
        Absent: it is not installed, not given, or has no such attention.
    """
    makers = {CLONE: lambda: _clone(reference, cosine), "sdpa": _sdpa, "flex": lambda: _flex(device),
              "natten": _natten}  # fmt: skip
    return makers[name]()


def cut(qkv: Tensor, num_heads: int, window_size: tuple[int, int], shift_size: tuple[int, int]
        ) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, W, 3·h·d) → q, k and v, each (B·windows, h, N, d)."""
    if any(shift_size):
        qkv = torch.roll(qkv, (-shift_size[0], -shift_size[1]), (1, 2))
    windows = partition(qkv, window_size)
    q, k, v = windows.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def put_back(out: Tensor, like: Tensor, window_size: tuple[int, int], shift_size: tuple[int, int]) -> Tensor:
    """(B·windows, h, N, d) → (B, H, W, h·d) on the map of ``like``."""
    tokens = unpartition(out.transpose(1, 2).flatten(2), window_size, like.shape[1], like.shape[2])
    return torch.roll(tokens, shift_size, (1, 2)) if any(shift_size) else tokens


@functools.lru_cache(maxsize=8)
def seams(height: int, width: int, window_size: tuple[int, int], shift_size: tuple[int, int], device: torch.device
          ) -> Tensor:
    """(windows, N, N) bool: the pairs of a window that the shift brought together. A model keeps them in a buffer."""
    groups = partition(shift_groups(height, width, shift_size, device)[None, ..., None], window_size)[..., 0]
    return groups[:, :, None] != groups[:, None, :]


def scaled(q: Tensor, k: Tensor, logit_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """q and k whose products are the logits without bias: normalised and multiplied by the scale, or by 1/√d."""
    if logit_scale is None:
        return q * q.shape[-1] ** -0.5, k
    scale = logit_scale.clamp(max=math.log(100.0)).exp().reshape(-1, 1, 1)
    wide = torch.promote_types(q.dtype, scale.dtype)
    normal = F.normalize(q.to(wide), dim=-1) * scale
    return normal.to(q.dtype), F.normalize(k.to(wide), dim=-1).to(k.dtype)


def _clone(reference: Path | None, cosine: bool) -> Rival:
    if reference is None:
        raise Absent(f"{CLONE}: give a clone of github.com/emiledgl/{CLONE} with --reference DIR")
    if not (reference / PACKAGE / "__init__.py").is_file():
        raise ValueError(f"--reference {reference} has no {PACKAGE}; give the folder of a clone of {CLONE}")
    if not cosine:
        raise Absent(f"{CLONE}: it normalises queries and keys, and has no scaled dot product of Swin")
    sys.path.insert(0, str(reference.resolve()))
    try:
        function = getattr(importlib.import_module(PACKAGE), FUNCTION)
    except (ImportError, AttributeError) as error:
        raise Absent(f"{CLONE}: {error}") from None
    finally:
        sys.path.remove(str(reference.resolve()))
    lacks = f"{_WINDOWS}; the mask is a tensor of every window; bias and scale in the low precision; the bias's " \
            "gradient by atomics, in no fixed order; no fp32"  # fmt: skip
    return Rival(CLONE, functools.partial(_by_clone, function), lacks)


def _by_clone(function: Callable[..., Tensor], qkv: Tensor, bias: Tensor, num_heads: int, window_size: tuple[int, int],
              shift_size: tuple[int, int], logit_scale: Tensor) -> Tensor:  # fmt: skip
    q, k, v = cut(qkv, num_heads, window_size, shift_size)
    mask = None
    if any(shift_size):
        mask = _added(qkv.shape[1], qkv.shape[2], window_size, shift_size, qkv.device, qkv.dtype)
    out = function(q, k, v, logit_scale.reshape(-1, 1, 1).to(q.dtype), bias.to(q.dtype), mask)
    return put_back(out, qkv, window_size, shift_size)


@functools.lru_cache(maxsize=8)
def _added(height: int, width: int, window_size: tuple[int, int], shift_size: tuple[int, int], device: torch.device,
           dtype: torch.dtype) -> Tensor:  # fmt: skip
    return seams(height, width, window_size, shift_size, device).to(dtype) * MASKED_LOGIT


def _sdpa() -> Rival:
    lacks = f"{_WINDOWS}; bias and mask are one tensor in the low precision, made for every window of an image; " \
            "queries and keys are normalised before it (timed)"  # fmt: skip
    return Rival("sdpa", _by_sdpa, lacks)


def _by_sdpa(qkv: Tensor, bias: Tensor, num_heads: int, window_size: tuple[int, int], shift_size: tuple[int, int],
             logit_scale: Tensor | None = None) -> Tensor:  # fmt: skip
    q, k, v = cut(qkv, num_heads, window_size, shift_size)
    q, k = scaled(q, k, logit_scale)
    added = bias.to(q.dtype)[None]
    if any(shift_size):
        # Its mask has one batch axis: the windows of an image are put beside the heads.
        mask = _added(qkv.shape[1], qkv.shape[2], window_size, shift_size, qkv.device, qkv.dtype)
        added = (added + mask[:, None]).flatten(0, 1)[None]
        q, k, v = (x.unflatten(0, (len(qkv), -1)).flatten(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=1.0)
    return put_back(out.reshape(-1, num_heads, *out.shape[2:]), qkv, window_size, shift_size)


def _flex(device: torch.device) -> Rival:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = device.type == "cuda"
    call: Any = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    how = "compiled" if compiled else "its eager form, which is no kernel and on a CPU has no gradient"
    lacks = f"{how}; {_WINDOWS}; queries and keys are normalised before it (timed)"
    rival = Rival("flex", functools.partial(_by_flex, call), lacks)
    return rival if compiled else replace(rival, grads=())


def _by_flex(flex: Callable[..., Tensor], qkv: Tensor, bias: Tensor, num_heads: int, window_size: tuple[int, int],
             shift_size: tuple[int, int], logit_scale: Tensor | None = None) -> Tensor:  # fmt: skip
    q, k, v = cut(qkv, num_heads, window_size, shift_size)
    q, k = scaled(q, k, logit_scale)
    apart = seams(qkv.shape[1], qkv.shape[2], window_size, shift_size, qkv.device) if any(shift_size) else None

    def score(logit: Tensor, b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        logit = logit + bias[h, row, column]
        if apart is None:
            return logit
        return logit + MASKED_LOGIT * apart[b % len(apart), row, column].to(logit.dtype)

    return put_back(flex(q, k, v, score_mod=score, scale=1.0), qkv, window_size, shift_size)


def _natten() -> Rival:
    try:
        from natten import na2d
    except ImportError as error:
        raise Absent(f"natten: {error}") from None
    lacks = "no position bias and no mask for a shift: ours is timed without both beside it; queries and keys are " \
            "normalised before it (timed)"  # fmt: skip
    return Rival("natten", functools.partial(_by_natten, na2d), lacks, ("qkv", "logit_scale"), False, False)


def _by_natten(na2d: Callable[..., Tensor], qkv: Tensor, bias: Tensor, num_heads: int, window_size: tuple[int, int],
               shift_size: tuple[int, int], logit_scale: Tensor | None = None) -> Tensor:  # fmt: skip
    """A stride of a whole window makes neighbourhoods that are windows; ``bias`` is zero and there is no shift."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(3)
    q, k = (x.transpose(-2, -3) for x in scaled(q.transpose(-2, -3), k.transpose(-2, -3), logit_scale))
    return na2d(q, k, v, kernel_size=window_size, stride=window_size, scale=1.0).flatten(3)
