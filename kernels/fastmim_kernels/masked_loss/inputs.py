"""What both masked losses ask of their target and mask, and how they take them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.arguments import DTYPES, as_mask, floating, shown, wrong
from ..common.token_layout import LOSSES


def check(op: str, tokens: Tensor, name: str, target: Tensor, mask: Tensor, stride: int, loss: str,
          mean: Tensor | None, std: Tensor | None) -> int:
    """Raise ``ValueError`` unless the arguments of ``op`` belong together; ``name`` is that of (B, h, w, …) ``tokens``.

    Returns:
        Values of a token, C·stride².
    """
    floating(op, tokens, mean, std)
    if loss not in LOSSES:
        raise ValueError(f"{op}: loss={shown(loss)}: must be one of {', '.join(LOSSES)}")
    if stride < 1:
        raise wrong(op, "stride", "1 or more pixels", stride)
    shape, grid = target.shape, tokens.shape
    if len(shape) != 4 or not shape[1] or not shape[2] or not shape[3] or not DTYPES["pixels"][1](target.dtype):
        raise wrong(op, "target", "(B, C, H, W), floating point or uint8", target)
    if len(grid) != 4 or grid[0] != shape[0] or grid[1] * stride < shape[2] or grid[2] * stride < shape[3]:
        least = f"({shape[0]}, h, w, …) with h and w of at least {-(-shape[2] // stride)} and {-(-shape[3] // stride)}"
        raise wrong(op, name, f"{least}, to cover a target of {tuple(shape)} at stride {stride}", tokens)
    _check_mask(op, mask, shape)
    for statistic, values in (("mean", mean), ("std", std)):
        if values is None and target.dtype == torch.uint8:
            raise wrong(op, statistic, f"{shape[1]} values: a uint8 target needs mean and std", None)
        if values is not None and values.numel() != shape[1]:
            raise wrong(op, statistic, f"{shape[1]} values, one a channel of target", values)
    return shape[1] * stride * stride


def _check_mask(op: str, mask: Tensor, target: torch.Size) -> None:
    shape = mask.shape
    if len(shape) != 3 or shape[0] != target[0] or not shape[1] or not shape[2] or target[2] % shape[1] \
            or target[3] % shape[2]:
        raise wrong(op, "mask", f"({target[0]}, Hm, Wm) with Hm and Wm dividing {target[2]} and {target[3]} of target",
                    mask)
    if mask.dtype.is_complex:
        raise wrong(op, "mask", "of bool or 0 and 1", mask)


def prepared(op: str, target: Tensor, mask: Tensor, mean: Tensor | None, std: Tensor | None
             ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Target, mask in bool, mean and std of ``op``, as the op takes them."""
    if target.dtype not in (torch.uint8, torch.float64):
        target = target.float()
    if target.dtype != torch.uint8:
        mean = std = None
    return target.detach(), as_mask(op, mask), mean, std


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
