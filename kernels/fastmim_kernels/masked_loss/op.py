"""Masked reconstruction loss (SimMIM, section 3.4) in token layout.

The image is cut into tokens instead of the prediction being shuffled into pixels, and the mask stays at
one value a patch: neither a full-resolution prediction nor a full-resolution mask is built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..common.arguments import explained, whole, wrong
from ..common.define_op import Kept, define_op
from ..common.token_layout import LOSSES, normalised
from . import on_torch
from .inputs import check, prepared, wide_dtype

__all__ = ["LOSSES", "OP", "masked_l1", "traffic"]


@explained(mask="mask", target="pixels")
def masked_l1(prediction: Tensor, target: Tensor, mask: Tensor, *, stride: int, loss: str = "l1",
              mean: Tensor | None = None, std: Tensor | None = None, impl: str = "auto") -> Tensor:
    """``Σ l(x̂, x)·m / (Σ m + 1e-5) / C`` over pixels, in float32.

    Args:
        prediction: (B, h, w, C·stride²), channels ordered (C, row, column) as a pixel shuffle expects.
        target: (B, C, H, W) float, or uint8 with ``mean`` and ``std``; ``h·stride ≥ H`` and ``w·stride ≥ W``
            (the excess is ignored). No gradient flows to it.
        mask: (B, Hm, Wm) bool or 0/1 with Hm | H and Wm | W; true where the loss counts. Other values are refused on a
            CPU; on a GPU, where the host would have to wait for them, all but 0 count as 1.
        stride: Pixels per token edge.
        loss: "l1", "l2" or "smooth_l1".
        mean, std: C channel statistics in [0, 1] units that normalise a uint8 target.

    Returns:
        Scalar, float32 (float64 for a float64 target).

    Raises:
        ValueError: An argument is not what is said here.
    """
    stride = whole(stride)
    values = check("masked_l1", prediction, "prediction", target, mask, stride, loss, mean, std)
    if prediction.shape[3] != values:
        raise wrong("masked_l1", "prediction", f"(B, h, w, {values}), C·stride² for target of {tuple(target.shape)}",
                    prediction)
    return OP(prediction, *prepared("masked_l1", target, mask, mean, std), stride, loss, impl=impl)


def traffic(grid: tuple[int, int, int], channels: int, stride: int, mask_cells: int, *, hit: float,
            itemsize: int = 2, target_itemsize: int = 4) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Least (bytes read, bytes written, FLOPs) of :func:`masked_l1`, forward and backward.

    Args:
        grid: (B, h, w) tokens of ``stride`` × ``stride`` pixels in ``channels``; ``mask_cells`` of the batch.
        hit: Share of tokens that contain masked pixels; only those are read.
        itemsize, target_itemsize: Bytes of a value of the prediction and of the target.
    """
    tokens = grid[0] * grid[1] * grid[2]
    values = channels * stride**2
    read = round(tokens * hit) * values * (itemsize + target_itemsize) + mask_cells
    return (read, 8, 0), (read + 4, tokens * values * itemsize, 0)


def _fake(prediction: Tensor, target: Tensor, mask: Tensor, mean: Tensor | None, std: Tensor | None, stride: int,
          loss: str, impl: str) -> tuple[Tensor, Tensor]:
    """(loss, 1 / (Σm + 1e-5) / C)."""
    dtype = wide_dtype(prediction.dtype, target.dtype)
    return prediction.new_empty((), dtype=dtype), prediction.new_empty((), dtype=dtype)


def _backward_fake(grad: Tensor, prediction: Tensor, target: Tensor, mask: Tensor, mean: Tensor | None,
                   std: Tensor | None, scale: Tensor, stride: int, loss: str, impl: str) -> Tensor:
    return torch.empty_like(prediction, memory_format=torch.contiguous_format)


def _save(inputs: Any, outputs: Any) -> Any:
    return (*inputs[:5], outputs[1]), inputs[5:]


def _gradients(backward: Callable, kept: Kept, grad: Tensor) -> tuple[Tensor]:
    return (backward(grad, *kept.tensors, *kept.settings),)


def _reference(prediction: Tensor, target: Tensor, mask: Tensor, mean: Tensor | None, std: Tensor | None,
               stride: int, loss: str) -> Tensor:
    wide = torch.promote_types(prediction.dtype, torch.float32) if mean is not None else target.dtype
    return reference.masked_l1(prediction, normalised(target, mean, std, wide), mask, stride, loss)


OP = define_op("masked_l1", on_torch, ".on_triton", reference=_reference, fake=_fake, backward_fake=_backward_fake,
               save=_save, gradients=_gradients)
