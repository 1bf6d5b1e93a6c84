"""Patch merging: four neighbouring tokens become one of 4C channels (Swin, section 3.1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import reference
from .dispatch import resolve


def patch_merge(x: Tensor, *, impl: str = "auto") -> Tensor:
    """Gather 2×2 neighbourhoods: (B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, 4C).

    Channel order is (row, column) = (0, 0), (1, 0), (0, 1), (1, 1), as in Microsoft's weights. An odd
    edge is padded with zeros.

    Raises:
        ValueError: ``x`` is not 4-d.
    """
    if x.ndim != 4:
        raise ValueError(f"patch_merge: x must be (B, H, W, C), got {tuple(x.shape)}")
    return resolve("patch_merge", impl, _IMPLEMENTATIONS, x.device)(x)


def _torch(x: Tensor) -> Tensor:
    b, h, w, c = x.shape
    if h % 2 or w % 2:
        x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
        b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)


_IMPLEMENTATIONS = {"torch": _torch, "reference": reference.patch_merge}
