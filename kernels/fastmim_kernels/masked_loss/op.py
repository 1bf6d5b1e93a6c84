"""Masked reconstruction loss (SimMIM, section 3.4) in token layout.

The image is cut into tokens instead of the prediction being shuffled into pixels, and the mask stays at
one value a patch: neither a full-resolution prediction nor a full-resolution mask is built.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from ..common.define_op import outside_autocast
from ..common.dispatch import resolve
from ..common.token_layout import (
    EPS,
    LOSSES,
    cover,
    loss_gradient_,
    loss_sum,
    masked_difference,
    normalised,
    patchify,
    pixel_scale,
    token_cells,
    token_chunks,
)
from .linear_op import linear_reference, linear_torch, linear_triton

__all__ = ["EPS", "LOSSES", "linear_masked_l1", "masked_l1", "patchify", "traffic"]


def masked_l1(prediction: Tensor, target: Tensor, mask: Tensor, *, stride: int, loss: str = "l1",
              mean: Tensor | None = None, std: Tensor | None = None, impl: str = "auto") -> Tensor:
    """``Σ l(x̂, x)·m / (Σ m + 1e-5) / C`` over pixels, in float32.

    Args:
        prediction: (B, h, w, C·stride²), channels ordered (C, row, column) as a pixel shuffle expects.
        target: (B, C, H, W) float, or uint8 with ``mean`` and ``std``; ``h·stride ≥ H`` and ``w·stride ≥ W``
            (the excess is ignored). No gradient flows to it.
        mask: (B, Hm, Wm) bool or 0/1 with Hm | H and Wm | W; true where the loss counts.
        stride: Pixels per token edge.
        loss: "l1", "l2" or "smooth_l1".
        mean, std: C channel statistics in [0, 1] units that normalise a uint8 target.

    Returns:
        Scalar, float32 (float64 for a float64 target).

    Raises:
        ValueError: Unknown loss, or shapes and dtypes that do not belong together.
    """
    _check(prediction.shape[:3], prediction.shape[-1], target, mask, stride, loss, mean, std)
    functions = _FLOAT64 if _wide(prediction, target) == torch.float64 else _IMPLEMENTATIONS
    function = resolve("masked_l1", impl, functions, prediction.device)
    with torch.autocast(prediction.device.type, enabled=False):
        return function(prediction, *_prepare(target, mask, mean, std), stride, loss)


def linear_masked_l1(tokens: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, mask: Tensor, *,
                     stride: int, loss: str = "l1", mean: Tensor | None = None, std: Tensor | None = None,
                     impl: str = "auto") -> Tensor:
    """:func:`masked_l1` of ``tokens·weightᵀ + bias``: SimMIM's linear head and its loss.

    Only tokens that contain masked pixels are projected, and loss and gradients are computed chunk by chunk,
    so that the prediction never exists as a whole. The gradients are computed in the forward pass.

    Args:
        tokens: (B, h, w, D).
        weight: (C·stride², D) and bias: (C·stride²,) or None, the 1×1 convolution of the head.

    Under autocast the products run in its dtype and the loss in float32. The other arguments, the result and
    the errors are those of :func:`masked_l1`.
    """
    _check(tokens.shape[:3], weight.shape[0], target, mask, stride, loss, mean, std)
    if weight.ndim != 2 or weight.shape[1] != tokens.shape[-1] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(f"linear_masked_l1: weight must be (C·stride², {tokens.shape[-1]}) and bias (C·stride²,), "
                         f"got {tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)}")
    functions = {"torch": linear_torch, "reference": linear_reference}
    if _wide(tokens, target) != torch.float64:
        functions["triton"] = linear_triton
    function = resolve("linear_masked_l1", impl, functions, tokens.device)
    device = tokens.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype
    dtype = tokens.dtype if tokens.dtype == torch.float64 else dtype
    with torch.autocast(device, enabled=False):
        return function(tokens, weight, bias, *_prepare(target, mask, mean, std), stride, loss, dtype)


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


def _prepare(target: Tensor, mask: Tensor, mean: Tensor | None, std: Tensor | None
             ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    if target.dtype not in (torch.uint8, torch.float64):
        target = target.float()
    if target.dtype != torch.uint8:
        mean = std = None
    return target.detach(), mask if mask.dtype == torch.bool else mask != 0, mean, std


def _check(grid: torch.Size, channels: int, target: Tensor, mask: Tensor, stride: int, loss: str,
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


def _reference(prediction: Tensor, target: Tensor, mask: Tensor, mean: Tensor | None, std: Tensor | None,
               stride: int, loss: str) -> Tensor:
    wide = torch.promote_types(prediction.dtype, torch.float32) if mean is not None else target.dtype
    return reference.masked_l1(prediction, normalised(target, mean, std, wide), mask, stride, loss)


@torch.library.custom_op("fastmim::masked_l1", mutates_args=())
def _op(prediction: Tensor, target: Tensor, mask: Tensor, mean: Tensor | None, std: Tensor | None, stride: int,
        loss: str, impl: str) -> tuple[Tensor, Tensor]:
    """(loss, 1 / (Σm + 1e-5) / C)."""
    if impl == "triton":
        from . import on_triton as kernels
        return kernels.forward(prediction.contiguous(), target.contiguous(), mask.contiguous(), mean, std, stride, loss)
    total, scale = _total(prediction, target, mask, mean, std, stride, loss)
    return total * scale, scale


@_op.register_fake
def _(prediction: Tensor, target: Tensor, mask: Tensor, mean: Tensor | None, std: Tensor | None, stride: int,
      loss: str, impl: str) -> tuple[Tensor, Tensor]:
    dtype = _wide(prediction, target)
    return prediction.new_empty((), dtype=dtype), prediction.new_empty((), dtype=dtype)


@torch.library.custom_op("fastmim::masked_l1_backward", mutates_args=())
def _backward_op(grad: Tensor, prediction: Tensor, target: Tensor, mask: Tensor, mean: Tensor | None,
                 std: Tensor | None, scale: Tensor, stride: int, loss: str, impl: str) -> Tensor:
    if impl == "triton":
        from . import on_triton as kernels
        return kernels.backward(grad * scale, prediction.contiguous(), target.contiguous(), mask.contiguous(), mean,
                                std, stride, loss)
    out = torch.zeros_like(prediction, memory_format=torch.contiguous_format)
    flat = out.flatten(0, 2)
    for rows, difference in _differences(prediction, target, mask, mean, std, stride):
        flat[rows] = loss_gradient_(difference, loss).mul_(grad * scale).flatten(1).to(flat.dtype)
    return out


@_backward_op.register_fake
def _(grad: Tensor, prediction: Tensor, target: Tensor, mask: Tensor, mean: Tensor | None, std: Tensor | None,
      scale: Tensor, stride: int, loss: str, impl: str) -> Tensor:
    return torch.empty_like(prediction, memory_format=torch.contiguous_format)


def _wide(prediction: Tensor, target: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (target.dtype, prediction.dtype) else torch.float32


def _total(prediction: Tensor, target: Tensor, mask: Tensor, mean: Tensor | None, std: Tensor | None, stride: int,
           loss: str) -> tuple[Tensor, Tensor]:
    total = prediction.new_zeros((), dtype=_wide(prediction, target))
    for _, difference in _differences(prediction, target, mask, mean, std, stride):
        total += loss_sum(difference, loss)
    return total, pixel_scale(target, mask, total.dtype)


def _differences(prediction: Tensor, target: Tensor, mask: Tensor, mean: Tensor | None, std: Tensor | None,
                 stride: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (row numbers of the flattened tokens, masked difference) in chunks that stay in cache."""
    grid = prediction.shape[1:3]
    cells = token_cells(mask, target.shape[2:], grid, stride)
    patches = patchify(cover(grid, target, stride), stride).flatten(0, 2)
    flat = prediction.flatten(0, 2)
    size = (target.shape[1], stride, stride)
    for rows, chosen in token_chunks(cells):
        chunk = normalised(patches[rows].unflatten(1, size), mean, std, _wide(prediction, target))
        yield rows, masked_difference(flat[rows], chunk, chosen)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    prediction, target, mask, mean, std, ctx.stride, ctx.loss, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(prediction, target, mask, mean, std, output[1])


@outside_autocast
def _autograd(ctx, grad, _scale):  # type: ignore[no-untyped-def]
    d_prediction = _backward_op(grad, *ctx.saved_tensors, ctx.stride, ctx.loss, ctx.impl)
    return d_prediction, *[None] * 7


torch.library.register_autograd("fastmim::masked_l1", _autograd, setup_context=_setup_context)


# No matrix product inside; torch's counter counts nothing else either.
@register_flop_formula([torch.ops.fastmim.masked_l1, torch.ops.fastmim.masked_l1_backward])
def _flops(*args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 0


def _torch(*args) -> Tensor:  # type: ignore[no-untyped-def]
    return _op(*args, "torch")[0]


def _triton(*args) -> Tensor:  # type: ignore[no-untyped-def]
    return _op(*args, "triton")[0]


_FLOAT64 = {"torch": _torch, "reference": _reference}
_IMPLEMENTATIONS = {**_FLOAT64, "triton": _triton}
