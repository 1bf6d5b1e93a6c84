"""Global attention by whichever of torch's ways is the fastest here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_TOKENS = 512
"""Up to which the scores of all heads may be in memory."""


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """``softmax(q·kᵀ/√d + bias)·v`` of (B, heads, N, d).

    The backward pass of torch's fused attention on a CPU takes two to five times as long in bfloat16 as plain products
    (37 to 197 tokens); in float32 it is the faster one.
    """
    few = q.shape[2] <= MOST_TOKENS
    if bias is None and few and q.dtype == torch.bfloat16 and _is_a_cpus(q):
        with torch.autocast("cpu", enabled=False):  # which would make the scores float32
            scores: Tensor = (q * q.shape[-1] ** -0.5) @ k.mT
            return scores.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, None if bias is None else bias.to(q.dtype))


def _is_a_cpus(q: Tensor) -> bool:
    """Whatever watches, so that recomputation takes the same way; compilers and traces, which are of a GPU, do not."""
    return q.is_cpu and type(q) is Tensor and not torch.compiler.is_compiling()
