"""What both masked losses ask of their target and mask, and how they take them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.token_layout import LOSSES


def check(grid: torch.Size, channels: int, target: Tensor, mask: Tensor, stride: int, loss: str,
           mean: Tensor | None, std: Tensor | None) -> None:
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r}: must be one of {', '.join(LOSSES)}")
    b, c, height, width = target.shape
    if channels != c * stride**2 or grid[0] != b or grid[1] * stride < height or grid[2] * stride < width:
        raise ValueError(f"masked_l1: {tuple(grid)} tokens of {channels} channels do not cover a target "
                         f"{tuple(target.shape)} at stride {stride}")
    if mask.ndim != 3 or mask.shape[0] != b or height % mask.shape[1] or width % mask.shape[2]:
        raise ValueError(f"masked_l1: mask {tuple(mask.shape)} must be (B, Hm, Wm) with Hm and Wm dividing "
                         f"the target's {height}x{width}")
    if target.dtype == torch.uint8 and (mean is None or std is None or mean.numel() != c or std.numel() != c):
        raise ValueError(f"masked_l1: a uint8 target needs mean and std with {c} values each")


def prepared(target: Tensor, mask: Tensor, mean: Tensor | None, std: Tensor | None
             ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    if target.dtype not in (torch.uint8, torch.float64):
        target = target.float()
    if target.dtype != torch.uint8:
        mean = std = None
    return target.detach(), mask if mask.dtype == torch.bool else mask != 0, mean, std


def wide_dtype(prediction: torch.dtype, target: torch.dtype) -> torch.dtype:
    """Of the loss: float64 where one of the two is, else float32."""
    return torch.float64 if torch.float64 in (prediction, target) else torch.float32


def loss_dtype(dtype: torch.dtype, target: torch.dtype) -> torch.dtype:
    """Of the loss of a head that computes in ``dtype``: float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    return wide if target == torch.uint8 else torch.promote_types(wide, target)


def buffers(tokens: Tensor, weight: Tensor, bias: Tensor | None, wide: torch.dtype, grads: bool
            ) -> tuple[Tensor, Tensor, Tensor]:
    """Of the gradients of tokens (zeros), weight (not set) and bias (zeros), empty where not wanted."""
    d_tokens = tokens.new_zeros(tokens.shape if grads else (0,))
    d_weight = tokens.new_empty(weight.shape if grads else (0,), dtype=wide)
    return d_tokens, d_weight, tokens.new_zeros(weight.shape[:1] if grads and bias is not None else (0,), dtype=wide)
